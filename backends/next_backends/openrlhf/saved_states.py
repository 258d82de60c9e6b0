"""What OpenRLHF leaves on disk: DeepSpeed's states, from which a trainer resumes, and models that it never removes."""

import re
import zipfile
from pathlib import Path

from next_core.sources.layouts import WRITTEN_LAST
from next_core.storage.atomic import remove_directory

LATEST = "latest"  # DeepSpeed's file that names the state to load


def newest_state(folder: Path) -> tuple[int, int] | None:
    """Return the first step of the trainer that left the newest whole state, and the state's step.

    None if there is no such state. Of two states of one step, the later trainer's counts.
    """
    found = [
        (step, start)
        for start, states in _numbered(folder, r"ckpt-(\d+)")
        for step, path in _numbered(states / "_actor", r"global_step(\d+)")
        if _whole(path)
    ]
    step, start = max(found, default=(0, 0))
    return (start, step) if found else None


def remove_old_models(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` models (``global_stepN_hf``): OpenRLHF removes none itself.

    An incomplete model, which lacks the tokenizer, is kept: it is still being written.
    """
    models = [
        (step, start, path)
        for start, states in _numbered(folder, r"ckpt-(\d+)")
        for step, path in _numbered(states, r"global_step(\d+)_hf")
        if (path / WRITTEN_LAST).exists()
    ]
    for _, _, path in sorted(models)[: max(0, len(models) - keep)]:
        remove_directory(path)


def _whole(state: Path) -> bool:
    """Whether both kinds of files are there and complete: PyTorch's archives have their index last."""
    parts = [list(state.glob(pattern)) for pattern in ("*model_states.pt", "*optim_states.pt")]
    return all(part and all(zipfile.is_zipfile(path) for path in part) for part in parts)


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for path in folder.glob("*") if (match := re.fullmatch(pattern, path.name))]
