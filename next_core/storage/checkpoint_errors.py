"""The kinds of ``CheckpointError`` that several readers raise."""

from __future__ import annotations

from pathlib import Path

from next_core.errors import CheckpointError


def ambiguous_step(message: str) -> CheckpointError:
    """Return the error for names that do not determine the steps."""
    return CheckpointError(message, kind="checkpoint-ambiguous-step")


def not_found(message: str) -> CheckpointError:
    """Return the error for a folder, step or tensor that does not exist."""
    return CheckpointError(message, kind="checkpoint-not-found")


def other_model(message: str) -> CheckpointError:
    """Return the error for files that do not belong to one run."""
    return CheckpointError(message, kind="checkpoint-other-model")


def unsafe_path(message: str) -> CheckpointError:
    """Return the error for a path that leads out of its folder."""
    return CheckpointError(message, kind="checkpoint-unsafe-path")


def damaged(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file whose content is wrong."""
    return CheckpointError(f"{path} {problem}; restore it, or remove its folder", kind="checkpoint-damaged")


def incomplete(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file or folder that lacks something."""
    return CheckpointError(
        f"{path} {problem}; the checkpoint is incomplete: remove or restore it", kind="checkpoint-incomplete"
    )
