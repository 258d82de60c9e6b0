"""The reward of the sorting task; it works the answer out from the prompt."""

from __future__ import annotations

from collections.abc import Sequence


def sort_digits(digits: str) -> str:
    """``"494348"`` -> ``"344489"``."""
    return "".join(sorted(digits))


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """1 for the sorted digits and nothing else, 0 for anything besides.

    Strings are compared, not numbers: a leading zero must be written, and what follows the digits is an error.
    """
    return [
        float(completion == sort_digits(prompt.removesuffix("=")))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
