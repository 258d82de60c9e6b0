"""The kinds of ``CheckpointError`` that several readers raise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from next_core.errors import CheckpointError

ambiguous_step = partial(CheckpointError, kind="checkpoint-ambiguous-step")
not_found = partial(CheckpointError, kind="checkpoint-not-found")
other_model = partial(CheckpointError, kind="checkpoint-other-model")
unsafe_path = partial(CheckpointError, kind="checkpoint-unsafe-path")


def damaged(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file whose content is wrong."""
    return CheckpointError(f"{path} {problem}; remove or restore this checkpoint", kind="checkpoint-damaged")


def incomplete(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file or folder that lacks something."""
    return CheckpointError(
        f"{path} {problem}; the checkpoint is incomplete: remove or restore it", kind="checkpoint-incomplete"
    )
