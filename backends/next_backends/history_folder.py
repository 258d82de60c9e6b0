"""The history that a backend keeps in its run folder: checkpoints, jumps and metrics."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from next_core.errors import CheckpointError, no_history
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.adapter_source import ADAPTER, PeftAdapterSource, PeftAdapterSourceConfig
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from next_core.sources.jumps import (
    CHECKPOINTS,
    DELETED,
    JUMP_RECORD,
    JUMPS,
    SHIFT_FILE,
    UNDONE,
    history_begins,
    jump_folders,
    jump_records,
)
from next_core.sources.metrics import METRICS
from next_core.sources.tensor_files import read_json
from next_core.storage.atomic import disk_operation, new_directory, remove_directory, sweep, write_text
from next_core.storage.json_lines import append_json_line
from next_core.storage.manifest import check_manifest


@dataclass(frozen=True)
class JumpAdapter:
    """A jump as a second, frozen adapter: its name in the model, PEFT's config as JSON, its tensors."""

    name: str
    config: str
    tensors: Mapping[str, Tensor]


class HistoryFolder:
    """``checkpoints/step-000010``, ``jumps/0001`` and ``metrics.jsonl`` in one folder, as our sources read them.

    Folders are created on the first write. Raises ``CheckpointError`` for a jump whose record is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.checkpoints, self.jumps = folder, folder / CHECKPOINTS, folder / JUMPS
        self.kept = folder / "kept"
        """The weights and moments that step scaling can return to."""
        self.opened: PeftAdapterSource | FullModelSource | None = None
        """What ``source`` returned last."""

    def source(self, lora: bool) -> PeftAdapterSource | FullModelSource:
        """Return the checkpoints as they are now; ``lora`` is whether they are adapters."""
        if self.opened is not None:
            self.opened.refresh()
        elif lora:
            self.opened = PeftAdapterSource(PeftAdapterSourceConfig(path=self.checkpoints))
        else:
            self.opened = FullModelSource(FullModelSourceConfig(path=self.checkpoints))
        return self.opened

    def checkpoint(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.checkpoints / f"step-{step:06d}"

    def clear(self) -> None:
        """Remove the checkpoints, jumps, kept states and metrics of an earlier run, and nothing else."""
        (self.path / METRICS).unlink(missing_ok=True)
        remove_directory(self.kept)
        for _, path in (*numbered(self.checkpoints, "step-*"), *numbered(self.jumps, "*")):
            remove_directory(path)
        (self.checkpoints / DELETED).unlink(missing_ok=True)
        self._sweep()

    def first_damaged(self) -> tuple[int, str] | None:
        """Read everything; return the first step whose checkpoint or jump is damaged, and what is wrong with it."""
        self._sweep()  # what a killed process was writing is not damage
        steps = list(numbered(self.checkpoints, "step-*"))
        last = 0
        for _, path in numbered(self.jumps, "*"):
            last = _jump_step(path) or last  # an unreadable jump was made after the one before it
            steps.append((last, path))
        damaged = []
        for step, path in steps:
            try:
                check_manifest(path, contents=True)
            except CheckpointError as error:
                damaged.append((step, error.message))
        return min(damaged, default=None)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints and jumps from after ``step``, at which a run is resumed.

        A jump whose record cannot be read is removed too: callers have checked ``first_damaged``, or all records.
        """
        for later, path in numbered(self.checkpoints, "step-*"):
            if later > step:
                remove_directory(path)
        for _, path in numbered(self.jumps, "*"):
            made = _jump_step(path)
            if made is None or made > step:
                remove_directory(path)
            elif (path / UNDONE).exists() and read_json(path / UNDONE)["step"] > step:
                (path / UNDONE).unlink()  # at the resumed step the jump was not undone yet
        self._sweep()

    def keep(self, kept: Sequence[range]) -> None:
        """Delete checkpoints and jumps outside ``kept``; the first of these ranges of steps is the run's history.

        Jump adapters stay, as parts of the model, and so does step 0 until a jump is deleted that moved it.
        """

        def outside(first: int, last: int) -> bool:
            return not any(first < steps.stop and last >= steps.start for steps in kept)

        begins, start = history_begins(self.checkpoints)
        old = [
            path
            for path, record, undone in jump_records(self.jumps)
            # Once undone, a jump hides the checkpoints before that.
            if record["adapter"] is None and outside(record["step"], undone or record["step"])
        ]
        start = start and not old
        checkpoints = numbered(self.checkpoints, "step-*")
        old += [path for step, path in checkpoints if outside(step, step) and not (start and step == 0)]
        # A checkpoint is wrong without the jumps after it: hidden before any is deleted.
        if old or begins:
            self._begin_at(kept[0].start, start)
        for path in old:
            remove_directory(path)

    def reopen(self, steps: range, every: int) -> None:
        """Begin the history at the first of these steps. Raises ``CheckpointError`` if a checkpoint was deleted."""
        begins, start = history_begins(self.checkpoints)
        if not begins:
            return
        there = {step for step, _ in numbered(self.checkpoints, "step-*")}
        gone = [step for step in steps if step % every == 0 and step not in there]
        if gone:
            raise no_history(
                f"resuming needs the checkpoint of step {gone[0]} in {self.checkpoints}, and the run has deleted it: "
                "keep: needed keeps what its own predictor reads after a resume from the checkpoints in the trainer's "
                "folder; resume with that predictor, from the newest of these"
            )
        self._begin_at(steps.start, start or steps.start == 0)

    def _begin_at(self, step: int, start: bool) -> None:
        """Hide the checkpoints before ``step``; ``start`` is whether step 0 is still right."""
        write_text(self.checkpoints / DELETED, json.dumps({"step": step, "start": start}))

    def next_jump(self) -> Path:
        """Return the folder for the next jump."""
        number = max((int(path.name) for path, _, _ in jump_records(self.jumps)), default=0) + 1
        return self.jumps / f"{number:04d}"

    def write_jump(
        self,
        target: Path,
        step: int,
        alpha: float,
        *,
        shift: Mapping[str, Tensor],
        adapter: JumpAdapter | None = None,
        more: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the folder of a jump made after ``step``: all of it, or nothing.

        ``shift`` is what the jump added to the weights: sources subtract it. ``more`` writes further files into the
        folder. Tensors are contiguous. Raises ``StorageError`` for a failed write, and whatever else ``more`` raises.
        """
        with disk_operation("writing the jump", target), new_directory(target) as folder:
            record = {"step": step, "alpha": alpha, "adapter": None if adapter is None else adapter.name}
            (folder / JUMP_RECORD).write_text(json.dumps(record))
            if adapter is not None:
                (folder / ADAPTER).mkdir()
                (folder / ADAPTER / CONFIG_FILE).write_text(adapter.config)
                save_file(dict(adapter.tensors), folder / ADAPTER / WEIGHTS_FILE, metadata={"format": "pt"})
            if shift:
                save_file(dict(shift), folder / SHIFT_FILE)
            if more is not None:
                more(folder)

    def withdraw(self, jump: Path, step: int) -> None:
        """Undo a jump after ``step`` ended: remove its folder at the step it was made, mark it as undone later."""
        if read_json(jump / JUMP_RECORD)["step"] == step:
            remove_directory(jump)  # no checkpoint contains it
        else:  # the trainer's checkpoints since then contain it, and a resume from one of them needs it
            write_text(jump / UNDONE, json.dumps({"step": step}))

    def jump_at(self, step: int) -> tuple[Path, dict[str, Any]] | None:
        """Return folder and record of the jump that was made after ``step``, unless it is undone."""
        return next((found for found in jump_folders(self.jumps) if found[1]["step"] == step), None)

    def active_adapters(self, step: int) -> dict[str, Path]:
        """Return the jump adapters that were active after ``step`` by name, in the order they were made: PEFT folders.

        A jump that was undone later is among them.
        """
        return {
            record["adapter"]: path / ADAPTER
            for path, record, undone in jump_records(self.jumps)
            if record["adapter"] and record["step"] <= step and (undone is None or undone > step)
        }

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Write the numbers that a trainer logs, for predictors that read a metric."""
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        append_json_line(self.path / METRICS, {"step": step, **numbers})

    def _sweep(self) -> None:
        sweep(self.checkpoints)
        sweep(self.jumps)


def numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Return the subfolders whose names end in a number, by number; hidden ones are incomplete."""
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob(pattern) if not path.name.startswith(".")]
    return sorted((int(number), path) for number, path in found if number.isdecimal() and path.is_dir())


def _jump_step(jump: Path) -> int | None:
    """Return the step after which a jump was made; None if its record cannot be read."""
    try:
        step = read_json(jump / JUMP_RECORD).get("step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) else None
