"""TRL's GRPO and RLOO trainers as the predict-extend cycle sees them: a live model, watched and moved in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from next_backends.trl.callback import StepCallback
from next_core.appliers.live import LiveApplied, LiveApplier, activate_jumps, is_peft, trained_adapter
from next_core.cycle.schedule import Schedule
from next_core.errors import BackendError, CheckpointError, ConfigError
from next_core.interfaces import Applied, Backend, PluginConfig, Prediction
from next_core.sources.folders import JUMP_RECORD, JUMPS, SHIFT_FILE, find_step_folders, jump_folders
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from next_core.sources.hf_model import SINGLE
from next_core.sources.peft_adapter import (
    ADAPTER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    PeftAdapterSource,
    PeftAdapterSourceConfig,
)
from next_core.storage import append_json_line, new_directory

if TYPE_CHECKING:
    from next_core.config import RunConfig


class TrlConfig(PluginConfig):
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of TRL's GRPOConfig or RLOOConfig, passed through"
    )


class TrlApplied(Applied):
    """A jump in a live trainer. Rolling back restores all that trains and its optimizer moments, also steps later."""

    def __init__(self, model: nn.Module, live: LiveApplied, folder: Path, optimizer: Any) -> None:
        self._live, self._folder, self._optimizer = live, folder, optimizer
        written = {id(parameter) for parameter in live.written}  # those the applier has kept already
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in written]
        self._kept = [(parameter, parameter.detach().clone()) for parameter in trained]
        self._state = _clone_state(optimizer)

    @torch.no_grad()
    def rollback(self) -> None:
        self._live.rollback()
        for parameter, kept in self._kept:
            parameter.copy_(kept)
        _restore_state(self._optimizer, self._state)
        shutil.rmtree(self._folder, ignore_errors=True)


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
        """Called when training begins or resumes: keep the starting point, or take up the history."""
        self._optimizer = optimizer
        if not is_peft(self._model):
            self._refuse_low_precision()
        if step == 0:
            self.observe(0)
            self.source()  # what cannot be read back (DoRA, no linear layer) is said now, not at the first jump
            return
        for later, path in find_step_folders(self._checkpoints).items():
            if later > step:
                shutil.rmtree(path)  # observed on a path that the resumed run no longer takes
        for path, record in self._jump_folders():
            if record["step"] > step:
                shutil.rmtree(path)
        if is_peft(self._model):
            expected = [record["adapter"] for _, record in self._jump_folders() if record["adapter"]]
            found = activate_jumps(self._model)
            if found != expected:
                raise CheckpointError(
                    f"resuming at step {step}: the jump adapters {expected} are recorded in {self._folder}, but the "
                    f"trainer's checkpoint brought {found or 'none'}; resume from a checkpoint of this run"
                )

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        callback = StepCallback(self.begin, step_ended, self.log)
        self.trainer.add_callback(callback)
        try:
            self.trainer.train(resume_from_checkpoint=str(self._resume_from) if self._resume_from else None)
        finally:
            self.trainer.remove_callback(callback)
            self._flush()
        if self.trainer.state.global_step < until:
            raise BackendError(
                f"training ended at step {self.trainer.state.global_step} of {until}; does `args` shorten it?"
            )

    def observe(self, step: int) -> None:
        """Copy the trained tensors now, and write them while training goes on."""
        config = None
        if is_peft(self._model):
            config, tensors = _adapter_files(self._model, trained_adapter(self._model))
        else:
            trained = ((n, p) for n, p in self._model.named_parameters() if p.requires_grad and p.dim() == 2)
            tensors = {name: parameter.detach().cpu().clone() for name, parameter in trained}
        self._flush()
        self._writing = self._writer.submit(_write_checkpoint, self._checkpoints / f"step-{step:06d}", tensors, config)
        if isinstance(self._source, PeftAdapterSource):
            self._source.remember(step, tensors)

    def _flush(self) -> None:
        """Wait for the checkpoint that is being written. Raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def source(self) -> PeftAdapterSource | FullModelSource:
        self._flush()
        if self._source is not None:
            self._source.refresh()
            return self._source
        if is_peft(self._model):
            self._source = PeftAdapterSource(PeftAdapterSourceConfig(path=self._checkpoints))
        else:
            self._source = FullModelSource(FullModelSourceConfig(path=self._checkpoints))
        return self._source

    def extend(self, prediction: Prediction, alpha: float) -> TrlApplied:
        live = LiveApplier().apply(prediction, alpha, out=self._model)
        number = max((int(path.name) for path, _ in self._jump_folders()), default=0) + 1
        target = self._folder / JUMPS / f"{number:04d}"
        try:
            with new_directory(target) as folder:
                record = {"step": prediction.step, "alpha": alpha, "adapter": live.adapter}
                (folder / JUMP_RECORD).write_text(json.dumps(record))
                if live.adapter is not None:
                    config, tensors = _adapter_files(self._model, live.adapter)
                    (folder / ADAPTER).mkdir()
                    (folder / ADAPTER / CONFIG_FILE).write_text(config)
                    save_file(tensors, folder / ADAPTER / WEIGHTS_FILE, metadata={"format": "pt"})
                if live.shift:
                    save_file(_to_save(live.shift), folder / SHIFT_FILE)
        except BaseException:
            live.rollback()
            raise
        return TrlApplied(self._model, live, target, self._optimizer)

    def restart_history(self) -> None:
        self._flush()
        for path in find_step_folders(self._checkpoints).values():
            shutil.rmtree(path)
        self._source = None

    def evaluate(self, split: str = "validation") -> float | None:
        return None if self._evaluate is None else self._evaluate(self._model, split)

    def log(self, step: int, logs: dict[str, Any]) -> None:
        """Keep what the trainer logs, for predictors that read a metric."""
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        append_json_line(self._folder / "metrics.jsonl", {"step": step, **numbers})

    @property
    def _checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    def _jump_folders(self) -> list[tuple[Path, dict[str, Any]]]:
        return jump_folders(self._folder / JUMPS)

    def _refuse_low_precision(self) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"'{name}' trains in {parameter.dtype}: most of a small jump would be lost in its rounding; "
                    "load the model in float32 (bf16 autocast is fine), or train LoRA"
                )


def check_boundaries(schedule: Schedule, total: int, args: Any) -> None:
    """Raise ``ConfigError`` when a jump would fall between a generation and the last step that uses it.

    TRL generates once every ``steps_per_generation * num_iterations`` micro-batches; a jump in between would train on
    roll-outs, and on log-probabilities, of weights that are gone.
    """
    reuse = args.steps_per_generation * args.num_iterations
    for step in schedule.attempt_steps(total):
        if step * args.gradient_accumulation_steps % reuse:
            unit = reuse // args.gradient_accumulation_steps
            raise ConfigError(
                f"a jump after step {step} would fall inside a generation that is used for {unit} steps; make "
                f"observe and jump_every multiples of {unit}"
            )


def _adapter_files(model: Any, adapter: str) -> tuple[str, dict[str, Tensor]]:
    """PEFT's config and a copy of the tensors of one adapter, by their names in PEFT's file."""
    suffix = f".{adapter}.weight"
    tensors = {
        name.removesuffix(suffix) + ".weight": value.detach().cpu().clone()
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if name.endswith(suffix) and ".lora_" in name
    }
    return json.dumps(model.peft_config[adapter].to_dict(), default=_jsonable, indent=1), tensors


def _write_checkpoint(target: Path, tensors: dict[str, Tensor], config: str | None) -> None:
    try:
        with new_directory(target, overwrite=True) as folder:
            if config is not None:
                (folder / CONFIG_FILE).write_text(config)
            save_file(tensors, folder / (SINGLE if config is None else WEIGHTS_FILE), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {target} could not be written: {error}") from error


def _to_save(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _clone_state(optimizer: Any) -> dict[Any, dict[str, Any]]:
    return {
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        for parameter, state in optimizer.state.items()
    }


@torch.no_grad()
def _restore_state(optimizer: Any, kept: dict[Any, dict[str, Any]]) -> None:
    for parameter, state in optimizer.state.items():
        for key, value in kept.get(parameter, {}).items():
            if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                state[key].copy_(value)
            else:
                state[key] = value
