"""Makes the sorting task from nothing: the digits of a number in ascending order, and the slips its base is made with.

Needs torch, transformers and tokenizers only; takes about a minute on one core::

    python examples/sorting/make_base.py
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sorting.reward import sort_digits  # noqa: E402
from task_kit import DATA_SEED, Recipe, Task, main  # noqa: E402

DIGITS = 6
DRAWN = 10_000


@dataclass(frozen=True)
class Problem:
    """Digits to be sorted; a digit may be there more than once."""

    digits: str

    @property
    def prompt(self) -> str:
        return f"{self.digits}="

    @property
    def answer(self) -> str:
        return sort_digits(self.digits)


def problems() -> list[Problem]:
    """Some of the million, leading zeros included, but none that is sorted already."""
    numbers = random.Random(DATA_SEED).sample(range(10**DIGITS), DRAWN)
    drawn = (f"{number:0{DIGITS}}" for number in numbers)
    return [Problem(digits) for digits in drawn if digits != sort_digits(digits)]


def half_sorted(digits: str, passes: int) -> str:
    """What a few passes of swapping neighbours make of the digits."""
    row = list(digits)
    for _ in range(passes):
        for at in range(len(row) - 1):
            if row[at] > row[at + 1]:
                row[at], row[at + 1] = row[at + 1], row[at]
    return "".join(row)


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """A slip somebody could make: two neighbours swapped, a digit lost for its neighbour, stopped before the end, or
    sorted the other way round.

    The kind is drawn first; a kind that gives the right answer is drawn again.
    """
    right = problem.answer
    while True:
        at = rng.randrange(DIGITS - 1)
        match rng.choice(("swapped", "lost", "unfinished", "descending")):
            case "swapped":
                slip = right[:at] + right[at + 1] + right[at] + right[at + 2 :]
            case "lost":
                slip = right[:at] + right[at + 1] + right[at + 1 :]
            case "unfinished":
                slip = half_sorted(problem.digits, passes=rng.randrange(1, 4))
            case _:
                slip = right[::-1]
        if slip != right:
            return slip


TASK = Task(
    name="sorting",
    characters="0123456789=",
    problems=problems,
    wrong_answer=wrong_answer,
    # Sorting is learned early and forgotten late: fewer clean steps, a larger rate and more wrong answers than sums.
    recipe=Recipe(clean_steps=400, noisy_steps=100, noisy_lr=4e-3, wrong_share=0.82),
)

if __name__ == "__main__":
    main(TASK, HERE)
