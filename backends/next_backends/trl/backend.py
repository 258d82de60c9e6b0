"""TRL's GRPO and RLOO trainers as the predict-extend cycle sees them: a live model, watched and moved in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from next_backends.trl.applied import BEFORE_FILE, StoredApplied, TrlApplied
from next_backends.trl.callback import StepCallback
from next_backends.trl.tensors import adapter_config, adapter_tensors, live_tensors, on_cpu, write_checkpoint
from next_core.appliers.live import LiveApplier, activate_jumps, is_peft, jump_adapters, trained_adapter
from next_core.errors import BackendError, CheckpointError, ConfigError
from next_core.interfaces import Applied, Backend, PluginConfig, Prediction
from next_core.sources.files import read_json
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from next_core.sources.jumps import CHECKPOINTS, JUMP_RECORD, JUMPS, SHIFT_FILE, UNDONE, jump_folders, jump_records
from next_core.sources.metrics import METRICS
from next_core.sources.peft_adapter import (
    ADAPTER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    PeftAdapterSource,
    PeftAdapterSourceConfig,
)
from next_core.storage import append_json_line, new_directory, remove_directory, sweep, write_text

if TYPE_CHECKING:
    from next_core.config import RunConfig


class TrlConfig(PluginConfig):
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of TRL's GRPOConfig or RLOOConfig, passed through"
    )


class TrlBackend(Backend):
    """Built from a config by ``prepare``, or tied to a running trainer's model by ``attach``."""

    name = "trl"
    config_class = TrlConfig

    def __init__(self, config: TrlConfig | None = None) -> None:
        super().__init__(config)
        self.trainer: Any = None
        self._model: Any = None
        self._optimizer: Any = None
        self._folder = Path()
        self._source: PeftAdapterSource | FullModelSource | None = None
        self._evaluate: Callable[[Any, str], float | None] | None = None
        self._resume_from: Path | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-core-checkpoint")
        self._writing: Future[None] | None = None

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Build model, LoRA, data, reward and trainer. Returns the step to go on from. Raises ``ConfigError``."""
        from next_backends.trl.build import build_trainer, last_checkpoint

        self.trainer, self._evaluate = build_trainer(run, self.config.args, out / "trainer")
        self.attach(self.trainer.model, out)
        self._resume_from, step = last_checkpoint(out / "trainer") if resume else (None, 0)
        return step

    def attach(
        self, model: nn.Module, folder: Path, evaluate: Callable[[Any, str], float | None] | None = None
    ) -> None:
        """Use a live model, and ``folder`` for checkpoints, jumps and metrics."""
        self._model, self._folder = model, folder
        self._evaluate = evaluate or self._evaluate

    def begin(self, step: int, optimizer: Any) -> None:
        """Called when training begins or resumes: keep the starting point, or take up the history.

        Everything is checked before anything is removed. Raises ``ConfigError``, ``BackendError``, ``CheckpointError``.
        """
        self._optimizer = optimizer
        if not is_peft(self._model):
            self._refuse_low_precision()
        if step > 0:
            self._check_resume(step)
            self._forget_after(step)
            self._source = None
        elif is_peft(self._model) and jump_adapters(self._model):
            raise BackendError("the model was extended by an earlier training; make a new one, or resume")
        else:
            clear(self._folder)
            self.observe(0)
        self.source()  # what cannot be read back (DoRA, no linear layer) is said now, not at the first jump

    def _check_resume(self, step: int) -> None:
        """Whether the trainer's checkpoint and this folder are of one run."""
        if not self._checkpoints.is_dir():
            raise CheckpointError(
                f"{self._folder} holds no history: this run was not watched from its start; resume it without jumps"
            )
        standing = [
            record["adapter"]
            for _, record, undone in jump_records(self._jumps)
            if record["adapter"] and record["step"] <= step and (undone is None or undone > step)
        ]
        found = activate_jumps(self._model) if is_peft(self._model) else []
        if found != standing:
            raise CheckpointError(
                f"resuming at step {step}: the jump adapters {standing} are recorded in {self._folder}, but the "
                f"trainer's checkpoint brought {found or 'none'}; resume from a checkpoint of this run"
            )
        if not (self._checkpoints / f"step-{step:06d}").is_dir():
            return
        source = self._open()
        for name, live in live_tensors(self._model):
            stored = source.stored(name, step)
            if stored.shape != live.shape or not torch.allclose(live.float().cpu(), stored, atol=1e-6, rtol=1e-5):
                raise CheckpointError(
                    f"resuming at step {step}: '{name}' is not what {self._folder} holds for that step; the trainer's "
                    "checkpoint is of another run"
                )

    def _forget_after(self, step: int) -> None:
        """Remove what was observed and made on a path that the resumed run does not take."""
        for later, path in _numbered(self._checkpoints, "step-*"):
            if later > step:
                remove_directory(path)
        for path, record, undone in jump_records(self._jumps):
            if record["step"] > step:
                remove_directory(path)
            elif undone is not None and undone > step:
                (path / UNDONE).unlink()  # at the resumed step the jump still stood
        sweep(self._checkpoints)
        sweep(self._jumps)

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        callback = StepCallback(self, step_ended)
        self.trainer.add_callback(callback)
        try:
            self.trainer.train(resume_from_checkpoint=str(self._resume_from) if self._resume_from else None)
        finally:
            self.trainer.remove_callback(callback)
        if self.trainer.state.global_step < until:
            raise BackendError(
                f"training ended at step {self.trainer.state.global_step} of {until}; does `args` shorten it?"
            )

    def observe(self, step: int) -> None:
        """Copy the trained tensors now, and write them while training goes on."""
        config = adapter_config(self._model, trained_adapter(self._model)) if is_peft(self._model) else None
        tensors = {name: value.cpu().clone() for name, value in live_tensors(self._model)}
        self.flush()
        self._writing = self._writer.submit(write_checkpoint, self._checkpoints / f"step-{step:06d}", tensors, config)
        if isinstance(self._source, PeftAdapterSource):
            self._source.remember(step, tensors)

    def flush(self) -> None:
        """Wait for the checkpoint that is being written. Raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def source(self) -> PeftAdapterSource | FullModelSource:
        self.flush()
        if self._source is None:
            self._source = self._open()
        else:
            self._source.refresh()
        return self._source

    def _open(self) -> PeftAdapterSource | FullModelSource:
        if is_peft(self._model):
            return PeftAdapterSource(PeftAdapterSourceConfig(path=self._checkpoints))
        return FullModelSource(FullModelSourceConfig(path=self._checkpoints))

    def extend(self, prediction: Prediction, alpha: float, keep: bool = False) -> TrlApplied:
        live = LiveApplier().apply(prediction, alpha, out=self._model)
        number = max((int(path.name) for path, _, _ in jump_records(self._jumps)), default=0) + 1
        applied = TrlApplied(self._model, self._optimizer, live, self._jumps / f"{number:04d}")
        try:
            with new_directory(applied.folder) as folder:
                record = {"step": prediction.step, "alpha": alpha, "adapter": live.adapter}
                (folder / JUMP_RECORD).write_text(json.dumps(record))
                if live.adapter is not None:
                    (folder / ADAPTER).mkdir()
                    (folder / ADAPTER / CONFIG_FILE).write_text(adapter_config(self._model, live.adapter))
                    tensors = on_cpu(adapter_tensors(self._model, live.adapter))
                    save_file(tensors, folder / ADAPTER / WEIGHTS_FILE, metadata={"format": "pt"})
                if live.shift:
                    save_file(on_cpu(live.shift), folder / SHIFT_FILE)
                if keep:
                    applied.save(self._model, folder / BEFORE_FILE)
        except BaseException as error:
            live.rollback()
            if isinstance(error, OSError | SafetensorError):
                raise BackendError(f"the jump could not be written to {applied.folder}: {error}") from error
            raise
        return applied

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, TrlApplied | StoredApplied)
        applied.rollback()
        if read_json(applied.folder / JUMP_RECORD)["step"] == step:
            remove_directory(applied.folder)  # no checkpoint has seen it
        else:  # the trainer's checkpoints since hold it, and a resume from one of them has to find it
            write_text(applied.folder / UNDONE, json.dumps({"step": step}))

    def standing(self, step: int) -> Applied | None:
        for path, record in jump_folders(self._jumps):
            if record["step"] == step and (path / BEFORE_FILE).exists():
                return StoredApplied(self._model, self._optimizer, path, record["adapter"])
        return None

    def evaluate(self, split: str = "validation") -> float | None:
        return None if self._evaluate is None else self._evaluate(self._model, split)

    def log(self, step: int, logs: dict[str, Any]) -> None:
        """Keep what the trainer logs, for predictors that read a metric."""
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        append_json_line(self._folder / METRICS, {"step": step, **numbers})

    @property
    def _checkpoints(self) -> Path:
        return self._folder / CHECKPOINTS

    @property
    def _jumps(self) -> Path:
        return self._folder / JUMPS

    def _refuse_low_precision(self) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"'{name}' trains in {parameter.dtype}: most of a small jump would be lost in its rounding; "
                    "load the model in float32 (bf16 autocast is fine), or train LoRA"
                )


def clear(folder: Path) -> None:
    """Remove what an earlier run left of checkpoints, jumps and metrics, by our own names and nothing else."""
    (folder / METRICS).unlink(missing_ok=True)
    for _, path in (*_numbered(folder / CHECKPOINTS, "step-*"), *_numbered(folder / JUMPS, "*")):
        remove_directory(path)
    sweep(folder / CHECKPOINTS)
    sweep(folder / JUMPS)


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Subfolders whose names end in a number."""
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob(pattern)]
    return sorted((int(number), path) for number, path in found if number.isdigit() and path.is_dir())
