"""Output heads that share their matrix with the input embedding: one parameter, whichever names a writer stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from next_core.errors import CheckpointError
from next_core.mathematics.row_blocks import row_blocks
from next_core.sources.hf_model import ModelFiles

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
BLOCK = 2**22
"""How many values are compared at a time."""


def tied_names(models: Sequence[ModelFiles]) -> tuple[str, str] | None:
    """The head's and the embedding's name where they are one parameter in these models of one run, else None.

    They are when ``config.json`` says so, or when some store both and others only one. Raises ``CheckpointError`` when
    a model that is so tied stores two that differ.
    """
    names = {name for model in models for name in model.shapes}
    head, embedding = _only(names, HEADS), _only(names, EMBEDDINGS)
    if head is None or embedding is None:
        return None
    said = {model.ties() for model in models}
    stored = [frozenset(model.shapes) & {head, embedding} for model in models]
    if True not in said and (False in said or len(set(stored)) == 1):
        return None
    for model, have in zip(models, stored, strict=True):
        if len(have) == 2 and not _equal(model, head, embedding):
            why = "config.json says tie_word_embeddings" if True in said else "other checkpoints store only one of them"
            raise CheckpointError(
                f"{model.folder}: '{head}' and '{embedding}' differ, but {why}; correct config.json, or restore this "
                "checkpoint"
            )
    return head, embedding


def _only(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    found = [name for name in names if name.endswith(endings)]
    return found[0] if len(found) == 1 else None


def _equal(model: ModelFiles, one: str, other: str) -> bool:
    """Whether two matrices are the same, row block by row block."""
    if model.shapes[one] != model.shapes[other]:
        return False
    blocks = row_blocks(model.shapes[one], BLOCK)
    return all(torch.equal(model.read(one, rows), model.read(other, rows)) for rows in blocks)
