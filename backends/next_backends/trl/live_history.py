"""The checkpoints and jumps of a model that trains in this process: written, read again, moved by and undone."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from next_backends.history_folder import HistoryFolder, JumpAdapter
from next_backends.trl.tensors import adapter_config, jump_tensors, live_tensors, write_checkpoint
from next_core.errors import CheckpointError, no_history, unsupported
from next_core.interfaces import Applied
from next_core.live_weights.frozen_adapters import (
    activate_jumps,
    add_saved_adapter,
    is_peft,
    jump_adapters,
    remove_adapter,
    trained_adapter,
)
from next_core.live_weights.in_memory import InMemoryApplied
from next_core.live_weights.live_model import LiveModel, kept_file
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.full_model import FullModelSource
from next_core.sources.tensor_files import read_json
from next_core.storage.atomic import seal


class TrlApplied(Applied):
    """A jump with its folder: one of this process, or an earlier one's, which is undone from the files there."""

    def __init__(self, live: LiveModel, folder: Path, made: InMemoryApplied | None, adapter: str | None) -> None:
        self.folder = folder
        self._live, self._made, self._adapter = live, made, adapter

    def rollback(self) -> None:
        if self._made is not None:
            self._made.rollback()
            return
        self._live.restore_saved(self.folder)
        if self._adapter is not None:
            self._live.change_adapters(remove_adapter, self._adapter)


class LiveHistory:
    """The history of a live model in a run's folder. Checkpoints are written while training goes on.

    ``live`` is set before training begins.
    """

    live: LiveModel

    def __init__(self, model: Any, path: Path) -> None:
        self.folder = HistoryFolder(path)
        self._lora = is_peft(model)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-core-checkpoint")
        self._writing: Future[None] | None = None
        self._forget: Callable[[], None] | None = None  # Deletes what is not needed after the last checkpoint

    def begin(self, step: int, checkpoint: Path) -> None:
        """Keep the starting point of a training that begins at ``step`` 0, or resume from the trainer's ``checkpoint``.

        Everything is checked before anything is removed.
        """
        if step > 0:
            self._check_resume(step, checkpoint)
            self.folder.forget_after(step)
        elif self._lora and jump_adapters(self.live.model):
            raise unsupported(
                "the model holds jump adapters of an earlier training; make a new model, or resume from a checkpoint"
            )
        else:
            self.folder.clear()
            self.observe(0)
        self.source()  # what cannot be read back (DoRA, no linear layer) fails now, not at the first jump

    def _check_resume(self, step: int, checkpoint: Path) -> None:
        """Raise ``CheckpointError`` unless the trainer's checkpoint and this folder are of one run."""
        path = self.folder.path
        if not self.folder.checkpoints.is_dir():
            raise no_history(
                f"{path} holds no history: this run was not observed from its start; resume it without jumps"
            )
        self._restore_adapters(step, checkpoint)
        if not self.folder.checkpoint(step).is_dir():
            return
        source = self.folder.source(self._lora)
        for name, live in live_tensors(self.live).items():
            stored = source.stored(name, step)
            if stored.shape != live.shape or not torch.allclose(live.float(), stored, atol=1e-6, rtol=1e-5):
                raise CheckpointError(
                    f"resuming at step {step}: '{name}' differs from what {path} holds for that step; the trainer's "
                    "checkpoint is of another run",
                    kind="checkpoint-other-model",
                )

    def _restore_adapters(self, step: int, checkpoint: Path) -> None:
        """Make the jump adapters of ``step`` active. DeepSpeed brings none back: they are read from our folder."""
        expected = self.folder.active_adapters(step)
        for name in self.folder.active_adapters(sys.maxsize):
            if name not in expected and not (checkpoint / name).exists():  # the model was interrupted in this process
                self.live.change_adapters(remove_adapter, name)
        found = self.live.change_adapters(activate_jumps) if self._lora else []
        if found != [*expected] and (found or self.live.weights.resumes_adapters):
            raise CheckpointError(
                f"resuming at step {step}: {self.folder.path} records the jump adapters {[*expected]}, but the "
                f"trainer's checkpoint holds {found or 'none'}; resume from a checkpoint of this run",
                kind="checkpoint-other-model",
            )
        for name in expected if not found else ():
            config, tensors = read_json(expected[name] / CONFIG_FILE), load_file(expected[name] / WEIGHTS_FILE)
            self.live.change_adapters(add_saved_adapter, name, config, tensors)

    def observe(self, step: int) -> None:
        """Copy the trained tensors now, and write them while training goes on."""
        config = adapter_config(self.live.model, trained_adapter(self.live.model)) if self._lora else None
        tensors = {name: value.contiguous() for name, value in live_tensors(self.live).items()}
        self._write(write_checkpoint, self.folder.checkpoint(step), tensors, config)
        if isinstance(self.folder.opened, PeftAdapterSource):
            self.folder.opened.remember(step, tensors)

    def seal(self, checkpoint: Path) -> None:
        """Seal a checkpoint that the trainer has written, while training goes on; what was observed comes first."""
        self.flush()
        if self._forget is not None:
            self._forget()  # the trainer may have deleted an older checkpoint
        self._write(_seal, checkpoint)

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        self.flush()
        self._writing = self._writer.submit(write, *arguments)

    def flush(self) -> None:
        """Wait for the checkpoint that is being written or sealed. Raises its error."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def forget(self, kept: Callable[[], Sequence[range]]) -> None:
        """Delete what lies outside ``kept``, now and whenever the trainer has saved."""
        self._forget = partial(self.forget, kept)
        self.folder.keep(kept())

    def source(self) -> PeftAdapterSource | FullModelSource:
        self.flush()
        return self.folder.source(self._lora)

    def record(self, folder: Path, step: int, alpha: float, made: InMemoryApplied, keep: bool) -> TrlApplied:
        """Write the folder of a jump that was made, with ``keep`` so that another process can undo it.

        A jump that cannot be written is undone.
        """
        try:
            self.folder.write_jump(
                folder,
                step,
                alpha,
                shift=made.shift,
                adapter=None if made.adapter is None else self._jump_adapter(made.adapter),
                more=(lambda there: self.live.save_kept(made.kept, there)) if keep else None,
            )
        except BaseException:
            made.rollback()
            raise
        return TrlApplied(self.live, folder, made, made.adapter)

    def _jump_adapter(self, name: str) -> JumpAdapter:
        model = self.live.model
        tensors = {key: value.cpu().contiguous() for key, value in jump_tensors(model, name).items()}
        return JumpAdapter(name, adapter_config(model, name), tensors)

    def made_at(self, step: int) -> TrlApplied | None:
        """Return the jump made after ``step``, by an earlier process; None if what was before it was not kept."""
        made = self.folder.jump_at(step)
        if made is None or not kept_file(made[0], 0).exists():
            return None
        return TrlApplied(self.live, made[0], None, made[1]["adapter"])


def _seal(checkpoint: Path) -> None:
    for scrap in checkpoint.glob(".tmp*"):  # of a process that was killed while safetensors wrote into this folder
        scrap.unlink(missing_ok=True)
    try:
        seal(checkpoint)
    except OSError:
        if checkpoint.is_dir():  # otherwise the trainer, which keeps only the newest, has removed it
            raise
