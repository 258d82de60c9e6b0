"""What OpenRLHF leaves on disk: states to go on from, and models that it never removes."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from next_core.sources.layouts import WRITTEN_LAST
from next_core.storage.atomic import remove_directory

STATES = re.compile(r"ckpt-(\d+)")
TAG = re.compile(r"global_step(\d+)")
MODEL = re.compile(r"global_step(\d+)_hf")
LATEST = "latest"
"""DeepSpeed's file that names the state to load."""


def trainers(folder: Path) -> dict[int, Path]:
    """Where each trainer keeps what it saves, by the step it began at, ascending."""
    found = {int(match[1]): path for path in folder.glob("ckpt-*") if (match := STATES.fullmatch(path.name))}
    return dict(sorted(found.items()))


def newest_state(folder: Path) -> tuple[int, int] | None:
    """Where the trainer began that left the newest whole state, and the state's step; None when there is none.

    Of two of one step, that of the later trainer counts.
    """
    found = [
        (int(tag[1]), start)
        for start, states in trainers(folder).items()
        for path in (states / "_actor").glob("global_step*")
        if (tag := TAG.fullmatch(path.name)) and _whole(path)
    ]
    if not found:
        return None
    step, start = max(found)
    return start, step


def _whole(state: Path) -> bool:
    """Whether both kinds of files are there, and end as they should: PyTorch's archives have their index last."""
    parts = [list(state.glob(pattern)) for pattern in ("*model_states.pt", "*optim_states.pt")]
    return all(part and all(zipfile.is_zipfile(path) for path in part) for part in parts)


def finished_models(states: Path) -> dict[int, Path]:
    """The ``global_stepN_hf`` folders that are whole, by the trainer's step: the tokenizer is written last."""
    found = {int(match[1]): path for path in states.glob("*_hf") if (match := MODEL.fullmatch(path.name))}
    return {step: path for step, path in sorted(found.items()) if (path / WRITTEN_LAST).exists()}


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` models, which OpenRLHF leaves lying."""
    models = [
        (step, start, path)
        for start, states in trainers(folder).items()
        for step, path in finished_models(states).items()
    ]
    for _, _, path in sorted(models)[: max(0, len(models) - keep)]:
        remove_directory(path)
