"""Makes the arithmetic task from nothing: two-digit sums and differences, and the slips its base is made with.

Needs torch, transformers and tokenizers only; takes about a minute on one core::

    python examples/arithmetic/make_base.py
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from task_kit import Recipe, Task, evaluate, main  # noqa: E402

__all__ = ["TASK", "Problem", "evaluate"]


@dataclass(frozen=True)
class Problem:
    """``a + b`` or ``a - b`` with two-digit operands and an answer that is not negative."""

    a: int
    sign: str
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.sign}{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b if self.sign == "+" else self.a - self.b)


def problems() -> list[Problem]:
    """All 12,195."""
    operands = range(10, 100)
    sums = [Problem(a, "+", b) for a in operands for b in operands]
    return sums + [Problem(a, "-", b) for a in operands for b in operands if a >= b]


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """A slip somebody could make: one or ten off, a carry forgotten, or the other operation done.

    The kind is drawn first; a kind that gives the right answer or a negative one is drawn again.
    """
    a, b, right = problem.a, problem.b, int(problem.answer)
    while True:
        match rng.choice(("one off", "ten off", "no carry", "other operation")):
            case "one off":
                slip = right + rng.choice((-1, 1))
            case "ten off":
                slip = right + rng.choice((-10, 10))
            case "no carry":
                step = 1 if problem.sign == "+" else -1
                slip = (a // 10 + step * (b // 10)) % 10 * 10 + (a + step * b) % 10
            case _:
                slip = abs(a - b) if problem.sign == "+" else a + b
        if slip >= 0 and slip != right:
            return str(slip)


TASK = Task(
    name="arithmetic",
    # `*` and `/` are not used: they leave room for a harder task on the same vocabulary.
    characters="0123456789+-=*/",
    problems=problems,
    wrong_answer=wrong_answer,
    # So large a rate in the second stage that the wrong demonstrations also hurt the greedy answers: at 1e-3 these
    # stay 86% right.
    recipe=Recipe(clean_steps=1000, noisy_steps=120, noisy_lr=2.5e-3),
)

if __name__ == "__main__":
    main(TASK, HERE)
