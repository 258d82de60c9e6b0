"""Makes the editing task from nothing: short programs on a word, and the slips its base is made with.

Needs torch, transformers and tokenizers only; takes about a minute on one core::

    python examples/editing/make_base.py
"""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from editing.reward import COMMANDS, edit  # noqa: E402
from task_kit import Recipe, Task, main  # noqa: E402

LETTERS, WORD, PROGRAM = "abcdefgh", 4, 3


@dataclass(frozen=True)
class Problem:
    """A word and the commands it is to go through."""

    word: str
    program: str

    @property
    def prompt(self) -> str:
        return f"{self.word}:{self.program}="

    @property
    def answer(self) -> str:
        return edit(self.word, self.program)


def problems() -> list[Problem]:
    """Every program on every word of different letters."""
    words = ["".join(letters) for letters in itertools.permutations(LETTERS, WORD)]
    programs = ["".join(commands) for commands in itertools.product(COMMANDS, repeat=PROGRAM)]
    return [Problem(word, program) for word in words for program in programs]


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """A slip somebody could make: a command left out, taken for another or done at another time, or two neighbouring
    letters swapped at the end.

    The kind is drawn first; a kind that gives the right answer is drawn again.
    """
    word, right = problem.word, problem.answer
    while True:
        program = list(problem.program)
        at = rng.randrange(PROGRAM)
        match rng.choice(("left out", "another", "order", "letters")):
            case "left out":
                slip = edit(word, problem.program[:at] + problem.program[at + 1 :])
            case "another":
                program[at] = rng.choice(tuple(COMMANDS))
                slip = edit(word, "".join(program))
            case "order":
                rng.shuffle(program)
                slip = edit(word, "".join(program))
            case _:
                at = rng.randrange(WORD - 1)
                slip = right[:at] + right[at + 1] + right[at] + right[at + 2 :]
        if slip != right:
            return slip


TASK = Task(
    name="editing",
    characters=f"{LETTERS}{''.join(COMMANDS)}:=",
    problems=problems,
    wrong_answer=wrong_answer,
    # What is known here is soon lost: with the wrong answers of the sums (65%) only a fifth would stay right.
    recipe=Recipe(clean_steps=1000, noisy_steps=120, wrong_share=0.55),
    architecture=LlamaConfig,
)

if __name__ == "__main__":
    main(TASK, HERE)
