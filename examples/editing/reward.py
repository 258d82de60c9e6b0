"""The reward of the editing task; it works the answer out from the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

COMMANDS: dict[str, Callable[[str], str]] = {
    "R": lambda word: word[::-1],
    "L": lambda word: word[1:] + word[:1],
    "S": lambda word: word[1::-1] + word[2:],
}


def edit(word: str, program: str) -> str:
    """The word after each command in turn: R reverses, L moves the first letter to the end, S swaps the first two."""
    for command in program:
        word = COMMANDS[command](word)
    return word


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """1 for the edited word and nothing else, 0 for anything besides."""
    return [
        float(completion == edit(*prompt.removesuffix("=").split(":")))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
