"""A task with a sparse reward: a word shifted along the alphabet and reversed, on a Llama with tied embeddings.

``dacbe+3=`` is answered by ``hefdg``: each letter moves three places on, in a circle, and the word is reversed. The
base writes the right answer in fewer than one of twenty samples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from task_kit import Recipe, Task
from transformers import LlamaConfig

LETTERS, WORD = "abcdefgh", 5


def shift(word: str, places: int) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + places) % len(LETTERS)] for letter in word)


@dataclass(frozen=True)
class Problem:
    """A word and by how many places its letters move."""

    word: str
    places: int

    @property
    def prompt(self) -> str:
        return f"{self.word}+{self.places}="

    @property
    def answer(self) -> str:
        return shift(self.word, self.places)[::-1]


def problems() -> list[Problem]:
    words = map("".join, itertools.permutations(LETTERS, WORD))
    return [Problem(word, places) for word in words for places in range(1, len(LETTERS))]


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """A slip somebody could make: a wrong shift, not reversed, or one letter a place off."""
    while True:
        match rng.choice(("shift", "order", "letter")):
            case "shift":
                slip = shift(problem.word, rng.randrange(len(LETTERS)))[::-1]
            case "order":
                slip = problem.answer[::-1]
            case _:
                at = rng.randrange(WORD)
                letter = shift(problem.answer[at], rng.choice((1, -1)))
                slip = problem.answer[:at] + letter + problem.answer[at + 1 :]
        if slip != problem.answer:
            return slip


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """1 for the shifted and reversed word and nothing else, 0 for anything besides."""
    asked = (prompt.removesuffix("=").split("+") for prompt in prompts)
    right = (Problem(word, int(places)).answer for word, places in asked)
    return [float(completion == answer) for completion, answer in zip(completions, right, strict=True)]


TASK = Task(
    name="shifting",
    characters=f"{LETTERS}1234567+=",
    problems=problems,
    wrong_answer=wrong_answer,
    # The skill is soon lost: a base of 150 noisy steps has nothing left that RL could find.
    recipe=Recipe(clean_steps=800, noisy_steps=20, noisy_lr=1e-3, wrong_share=0.6),
    architecture=LlamaConfig,
    tied=True,
)
