"""The states that step scaling can return to: in memory until they are on the disk."""

import contextlib
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core.errors import StorageError, describe, no_history
from next_core.live_weights.kept_state import KeptState
from next_core.live_weights.trained_weights import TrainedWeights
from next_core.storage.atomic import disk_operation, sweep
from next_core.storage.manifest import MANIFEST, digest_of

KEPT = 2  # States to return to: the newer may already be part of a collapse that the reward does not show yet
FIRST = 100  # RL steps until which the first weights are kept too: a rate that is far too large may show this late
PREFIX = "kept/"  # Of the names of states in a checkpoint's file


@dataclass
class _Kept:
    """A state after ``updates`` steps of the optimizer. ``state`` is None once a file with this ``digest`` holds it."""

    step: int
    updates: int
    state: KeptState | None
    digest: str | None = None
    writing: Future[None] | None = None

    def wait(self) -> None:
        if self.writing is not None:
            self.writing.result()


class KeptStates:
    """One process's part of the states to return to, oldest first.

    A background thread writes each to ``folder`` and drops it from memory; one that cannot be written stays there. The
    trainer's checkpoints hold the digests of these files. A file is deleted once neither this run nor a resume from a
    checkpoint needs it.
    """

    def __init__(self, trained: TrainedWeights, folder: Path, rank: int) -> None:
        self._trained, self._folder, self._rank = trained, folder, rank
        self._states: deque[_Kept] = deque()
        self._saved: list[tuple[Path, Sequence[int]]] = []
        """The checkpoints from which the run may be resumed, oldest first, with the steps of their states."""
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-core-kept")
        self._warned = False
        sweep(folder)

    @property
    def steps(self) -> list[int]:
        """The steps after which a state was kept."""
        return [kept.step for kept in self._states]

    def keep(self, step: int, updates: int) -> None:
        """Keep the present state; the oldest of more than ``KEPT``, besides the first weights, is dropped."""
        first = int(step <= FIRST and bool(self._states) and self._states[0].step == 0)
        while len(self._states) - first >= KEPT:
            dropped = self._states[first]
            del self._states[first]
            dropped.wait()  # on a slow disk, memory holds no more than these states either
        kept = _Kept(step, updates, KeptState.of(self._trained))
        self._states.append(kept)
        if self._trained.shards:  # only process 0 of a data-parallel run has any
            kept.writing = self._writer.submit(self._write, kept, self._file(step))

    def _write(self, kept: _Kept, file: Path) -> None:
        assert kept.state is not None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            kept.digest = kept.state.write(file)
            kept.state = None
        except Exception as error:  # such as a full disk, which must not end the training
            if not self._warned:
                self._warned = True
                text = "the weights and moments of step %d stay in memory: %s could not be written (%s)"
                logging.getLogger(__name__).warning(text, kept.step, file, describe(error))

    def recall(self, step: int) -> None:
        """Read the state of ``step`` back into memory and drop those kept later.

        Raises ``CheckpointError`` if its file is gone or damaged.
        """
        while self._states[-1].step != step:
            self._states.pop().wait()
        kept = self._states[-1]
        kept.wait()
        if kept.state is not None:
            return
        file = self._file(step)
        try:
            if not self._intact(kept):
                raise ValueError("it is gone or damaged")  # noqa: TRY301
            kept.state = KeptState.from_tensors(load_file(file), self._trained)
        except Exception as error:
            raise no_history(
                f"{file} does not hold the weights of step {step}, to which the run should return "
                f"({describe(error)}); resume from the trainer's last checkpoint"
            ) from error

    def restore(self) -> int:
        """Restore the newest state, which was recalled. Returns after how many steps of the optimizer it was kept."""
        kept = self._states[-1]
        assert kept.state is not None
        kept.state.restore(self._trained)
        if kept.digest is not None:
            kept.state = None
        return kept.updates

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint holds of the states: a digest, or everything where there is no file."""
        for kept in self._states:
            kept.wait()
            start = f"{PREFIX}{kept.step}/{kept.updates}/"
            yield start, torch.zeros(0)  # a process may have no shard
            if kept.state is None and kept.digest is not None:
                yield f"{start}digest", torch.tensor(list(bytes.fromhex(kept.digest)), dtype=torch.uint8)
            elif kept.state is not None:
                yield from kept.state.tensors(start)

    def saved(self, checkpoint: Path) -> None:
        """Take account of a checkpoint that holds these states."""
        self._saved.append((checkpoint, self.steps))

    def load(self, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
        """Restore what ``tensors`` yielded, from a complete checkpoint. Raises ``ValueError`` for other shapes."""
        held = {tuple(map(int, name.split("/")[1:3])) for name in tensors if name.startswith(PREFIX)}
        for step, updates in sorted(held):
            start = f"{PREFIX}{step}/{updates}/"
            digest = tensors.get(f"{start}digest")
            if digest is None:
                self._states.append(_Kept(step, updates, KeptState.from_tensors(tensors, self._trained, start)))
            else:
                self._states.append(_Kept(step, updates, None, bytes(digest.tolist()).hex()))
        self.saved(checkpoint)

    def lost(self) -> list[int]:
        """Return the steps of the states that are neither in memory nor in an intact file."""
        return [kept.step for kept in self._states if kept.state is None and not self._intact(kept)]

    def drop(self, steps: Collection[int]) -> None:
        """Forget the states of these steps."""
        self._states = deque(kept for kept in self._states if kept.step not in steps)

    def in_checkpoints(self) -> set[int]:
        """Return the steps of the states in the newest complete checkpoint and those after it.

        A manifest tells that a checkpoint is complete. Where the trainer writes none, all but the last are.
        """
        complete = [number for number, (path, _) in enumerate(self._saved) if (path / MANIFEST).exists()]
        self._saved = self._saved[complete[-1] if complete else -2 :]
        return {step for _, steps in self._saved for step in steps}

    def prune(self, needed: Collection[int]) -> None:
        """Delete the files of all states but the present ones and those of the steps ``needed``."""
        kept = {self._file(step) for step in (*self.steps, *needed)}
        for file in sorted(self._folder.glob(f"step-*-{self._rank}.safetensors")):
            if file not in kept:
                with contextlib.suppress(StorageError), disk_operation("removing", file):
                    file.unlink()

    def close(self) -> None:
        """Delete what only this run could return to, once everything is written."""
        self._writer.shutdown()
        self._states.clear()
        self.prune(self.in_checkpoints())

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}-{self._rank}.safetensors"

    def _intact(self, kept: _Kept) -> bool:
        try:
            return digest_of(self._file(kept.step)) == kept.digest
        except OSError:
            return False
