"""A task with longer completions: the running sums of twelve digits, modulo ten, on a Qwen2.

``385216470912=`` is answered by ``361798513346``. An error early on spoils the rest, so the probability of a right
answer falls with its length.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from task_kit import DATA_SEED, Recipe, Task

DIGITS, DRAWN = 12, 10_000


def running_sums(digits: Sequence[int]) -> str:
    return "".join(str(total % 10) for total in itertools.accumulate(digits))


@dataclass(frozen=True)
class Problem:
    """Digits to be summed."""

    digits: str

    @property
    def prompt(self) -> str:
        return f"{self.digits}="

    @property
    def answer(self) -> str:
        return running_sums([int(digit) for digit in self.digits])


def problems() -> list[Problem]:
    return [Problem(f"{n:0{DIGITS}}") for n in random.Random(DATA_SEED).sample(range(10**DIGITS), DRAWN)]


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """A slip somebody could make: from one digit on a sum is one too large or too small, or a digit is left out."""
    digits = [int(digit) for digit in problem.digits]
    while True:
        slipped, at = list(digits), rng.randrange(DIGITS)
        slipped[at] = rng.choice((slipped[at] + 1, slipped[at] - 1, 0))
        if slipped[at] % 10 != digits[at]:
            return running_sums(slipped)


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """1 for the running sums and nothing else, 0 for anything besides."""
    right = (Problem(prompt.removesuffix("=")).answer for prompt in prompts)
    return [float(completion == answer) for completion, answer in zip(completions, right, strict=True)]


TASK = Task(
    name="running-sums",
    characters="0123456789=",
    problems=problems,
    wrong_answer=wrong_answer,
    recipe=Recipe(clean_steps=150, noisy_steps=60, noisy_lr=1e-3, wrong_share=0.8),
)
