"""What OpenRLHF leaves on disk: states to go on from, and models that it never removes."""

from __future__ import annotations

import re
from pathlib import Path

from next_core.sources.layouts import WRITTEN_LAST
from next_core.storage import remove_directory

STATES = re.compile(r"ckpt-(\d+)")
TAG = re.compile(r"global_step(\d+)")
MODEL = re.compile(r"global_step(\d+)_hf")


def newest_state(folder: Path) -> tuple[int, int] | None:
    """Where the trainer began that left the newest complete state, and the state's step; None when there is none.

    DeepSpeed writes ``latest`` last. A later trainer's state counts more: an earlier one's newer steps were left by
    a jump's way back.
    """
    found = []
    for path in folder.glob("ckpt-*"):
        match = STATES.fullmatch(path.name)
        latest = path / "_actor" / "latest"
        if match is None or not latest.is_file():
            continue
        tag = TAG.fullmatch(latest.read_text(encoding="utf-8", errors="replace").strip())
        if tag is not None and _complete(path / "_actor" / tag[0]):
            found.append((int(match[1]), int(tag[1])))
    return max(found, key=lambda state: (state[1], state[0]), default=None)


def _complete(state: Path) -> bool:
    parts = [list(state.glob(pattern)) for pattern in ("*model_states.pt", "*optim_states.pt")]
    return all(part and all(path.stat().st_size > 0 for path in part) for part in parts)


def finished_models(states: Path) -> dict[int, Path]:
    """The ``global_stepN_hf`` folders that are whole, by the trainer's step: the tokenizer is written last."""
    found = {int(match[1]): path for path in states.glob("*_hf") if (match := MODEL.fullmatch(path.name))}
    return {step: path for step, path in sorted(found.items()) if (path / WRITTEN_LAST).exists()}


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` models, which OpenRLHF leaves lying."""
    models = [
        (int(states.name.removeprefix("ckpt-")), step, path)
        for states in folder.glob("ckpt-*")
        if STATES.fullmatch(states.name)
        for step, path in finished_models(states).items()
    ]
    for _, _, path in sorted(models)[: max(0, len(models) - keep)]:
        remove_directory(path)
