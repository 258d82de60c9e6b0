"""Output heads that share their matrix with the input embedding: one parameter, under either name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from next_core.errors import CheckpointError
from next_core.mathematics.row_blocks import row_blocks
from next_core.sources.hf_model import ModelFiles
from next_core.sources.matrices import EMBEDDINGS, HEADS

BLOCK = 2**22
"""Number of values compared at a time."""


def tied_names(models: Sequence[ModelFiles]) -> tuple[str, str] | None:
    """Return the names of head and embedding if they are one parameter in these models of one run, else None.

    They are if ``config.json`` says so, or if some models store both and others only one. Raises ``CheckpointError``
    if a model that is tied in this way stores two that differ.
    """
    names = {name for model in models for name in model.shapes}
    head, embedding = _only(names, HEADS), _only(names, EMBEDDINGS)
    if head is None or embedding is None:
        return None
    declared = {model.declares_tie() for model in models}
    stored = [frozenset(model.shapes) & {head, embedding} for model in models]
    if True not in declared and (False in declared or len(set(stored)) == 1):
        return None
    for model, both in zip(models, stored, strict=True):
        if len(both) == 2 and not _equal(model, head, embedding):
            why = "config.json says that they are tied" if True in declared else "other checkpoints store only one"
            raise CheckpointError(
                f"{model.folder}: '{head}' and '{embedding}' differ, but {why}; correct config.json, or restore this "
                "checkpoint",
                kind="checkpoint-damaged",
            )
    return head, embedding


def _only(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    matching = [name for name in names if name.endswith(endings)]
    return matching[0] if len(matching) == 1 else None


def _equal(model: ModelFiles, one: str, other: str) -> bool:
    if model.shapes[one] != model.shapes[other]:
        return False
    blocks = row_blocks(model.shapes[one], BLOCK)
    return all(torch.equal(model.read(one, rows), model.read(other, rows)) for rows in blocks)
