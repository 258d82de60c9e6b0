"""The matrices in a stored tensor: itself, or those of a stack, as transformers stores experts: ``down_proj[3]``."""

import re
from collections.abc import Sequence

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
IN_STACK = re.compile(r"(.+)\[(\d+)\]")


def matrices_in(name: str, shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return the names and shapes (m, n) of the matrices in a tensor; none for vectors, scalars and convolutions.

    A tensor (E, m, n) is E matrices, ``name[0]`` to ``name[E - 1]``: an expert's directions are those of its own
    matrix. The kernel of a convolution over time has three dimensions too, and is known by its name.
    """
    if len(shape) == 2:
        return {name: (shape[0], shape[1])}
    if len(shape) == 3 and min(shape[1:]) > 1 and "conv" not in name:
        return {f"{name}[{index}]": (shape[1], shape[2]) for index in range(shape[0])}
    return {}


def stored_name(name: str) -> str:
    """Return the name of the tensor that holds a matrix."""
    match = IN_STACK.fullmatch(name)
    return name if match is None else match[1]


def place_in_stack(name: str) -> int | None:
    """Return the index of a matrix in its stack; None for a matrix that is stored alone."""
    match = IN_STACK.fullmatch(name)
    return None if match is None else int(match[2])


def other_vocabulary(name: str, one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two shapes of one tensor differ by the size of the vocabulary alone."""
    return name.endswith((*HEADS, *EMBEDDINGS)) and one[0] != other[0] and tuple(one[1:]) == tuple(other[1:])
