"""The real OpenRLHF as a backend: a trainer in its own environment, driven segment by segment."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from next_backends.history_folder import JumpAdapter
from next_backends.openrlhf.command import check_run
from next_backends.openrlhf.environment import parse
from next_backends.openrlhf.merge_mode import MergeMode
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.swap_mode import RestartMode, SwapMode
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.appliers.jump_adapter import adapter_settings, adapter_tensors
from next_core.backend import Backend
from next_core.cycle.journal import JOURNAL, read_journal, valid_jumps
from next_core.errors import BackendError, describe
from next_core.interfaces import Applied, Prediction
from next_core.interfaces.prediction import weight_deltas
from next_core.interfaces.weight_delta import FactorStep
from next_core.mathematics.low_rank import LowRank, dense
from next_core.sources.adapter_source import JUMP_PREFIX, SHIFT_KEYS, PeftAdapterSource, PeftAdapterSourceConfig
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from next_core.storage.atomic import new_directory, remove_directory

if TYPE_CHECKING:
    from next_core.run_config import RunConfig

MODES: dict[str, type[SwapMode | MergeMode]] = {"swap": SwapMode, "restart": RestartMode, "merge": MergeMode}


class OpenRlhfBackend(Backend):
    """Drives OpenRLHF 0.11.2 in the environment of ``python``; nothing of it is imported here.

    The trainer's processes, logs and own checkpoints are under ``trainer/`` in the run folder.
    """

    name = "openrlhf"
    config_class = OpenRlhfConfig
    in_process = False

    def __init__(self, config: OpenRlhfConfig) -> None:
        super().__init__(config)
        self._setup: TrainerSetup
        self._mode: SwapMode | MergeMode
        self._source: PeftAdapterSource | FullModelSource | None = None
        self._resumed = False
        self._at = 0
        self._open = contextlib.ExitStack()

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Check all that needs no GPU, by OpenRLHF's own parser too. The trainer starts later."""
        self._plan(run, out)
        setup = self._setup
        self._open.callback(setup.close)
        self._open.callback(self._mode.close)
        setup.serve_rewards()
        args = parse(self.config, setup.options(0))
        batch = args["rollout"]["batch_size"] * args["rollout"]["n_samples_per_prompt"]
        setup.updates = max(1, batch // args["train"]["batch_size"]) * args["train"]["max_epochs"]
        if not resume:
            setup.history.clear()
            return 0
        self._resumed = True
        journal = out / JOURNAL
        jumps = valid_jumps(read_journal(journal)) if journal.exists() else []
        self._at = self._mode.resume({jump["step"] for jump in jumps if jump["accepted"]})
        return self._at

    def start(self) -> None:
        """Start the trainer and keep its initial weights."""
        self._mode.start()
        if self._mode.keeps_start and not self._resumed:
            self.observe(0)
            self.source()  # raises now, and not at the first jump, if it cannot be read back

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        self._setup.step_ended = step_ended
        self._mode.train(until)
        self._at = until

    def observe(self, step: int) -> None:
        with new_directory(self._setup.history.checkpoint(step), overwrite=True) as folder:
            self._mode.save(step, folder)

    def source(self) -> PeftAdapterSource | FullModelSource:
        path = self._setup.history.checkpoints
        if self._source is not None:
            self._source.refresh()
        elif self._setup.run.training.lora is not None:
            self._source = PeftAdapterSource(PeftAdapterSourceConfig(path=path))
        else:
            backbone = None if self._mode.keeps_start else self._setup.run.training.model
            self._source = FullModelSource(FullModelSourceConfig(path=path, backbone=backbone))
        return self._source

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> JumpApplied:
        step, history = prediction.step, self._setup.history
        folder = history.next_jump()
        shift, frozen = split_updates(prediction, alpha, lora=self._setup.run.training.lora is not None)
        adapter = None
        if frozen:
            settings = adapter_settings(frozen) | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
            adapter = JumpAdapter(f"{JUMP_PREFIX}{int(folder.name)}", json.dumps(settings), adapter_tensors(frozen))
        more = self._mode.save_for_rollback if keep else None
        history.write_jump(folder, step, alpha, shift=shift, adapter=adapter, more=more)
        try:
            self._mode.jump(step, prediction, alpha)
        except BaseException as error:
            remove_directory(folder)
            try:
                self._mode.undo(step)
            except Exception as again:
                error.add_note(f"the weights from before the jump could not be restored either: {describe(again)}")
                self._mode.abandon()
            raise
        return JumpApplied(self, folder, step)

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, JumpApplied)
        self._setup.history.withdraw(applied.folder, step)
        self._mode.undo(applied.step, None if step == applied.step else applied.folder)

    @property
    def step(self) -> int:
        """The last step that ended."""
        return self._at

    def active_jump(self, step: int) -> Applied | None:
        found = self._setup.history.jump_at(step)
        return JumpApplied(self, found[0], step) if found and self._mode.can_roll_back(found[0]) else None

    def evaluate(self, split: str = "validation") -> float | None:
        return self._mode.evaluate(split)

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        found = self.evaluate(split)
        sampled = self._setup.run.training.evaluation == "likelihood"
        return {} if found is None else {"sampled" if sampled else "greedy": found}

    @property
    def notes(self) -> Sequence[str]:
        return self._mode.notes

    def close(self) -> None:
        self._open.close()

    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        self._plan(run, out)
        steps = self._mode.stop(0) if isinstance(self._mode, MergeMode) else None
        return {"command line": ["openrlhf.cli.train_ppo_ray", *self._setup.options(0, steps=steps)]}

    def _plan(self, run: RunConfig, out: Path) -> None:
        check_run(run, self.config)
        self._setup = TrainerSetup(run, self.config, out)
        self._mode = MODES[self.config.jump](self._setup)


class JumpApplied(Applied):
    """A jump that can be rolled back from the files in the run folder."""

    def __init__(self, backend: OpenRlhfBackend, folder: Path, step: int) -> None:
        self._backend, self.folder, self.step = backend, folder, step

    def rollback(self) -> None:
        self._backend.rollback(self, self._backend.step)


def split_updates(prediction: Prediction, alpha: float, lora: bool) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """Return the shift of the trained tensors (fp32, by the names of a shift file) and what a frozen adapter holds."""
    shift: dict[str, Tensor] = {}
    frozen: dict[str, LowRank] = {}
    for name, delta in weight_deltas(prediction, alpha):
        if isinstance(delta, FactorStep):
            for key, factor, step in zip(SHIFT_KEYS, (delta.at.A, delta.at.B), (delta.dA, delta.dB), strict=True):
                # What fp32 factors really move by, rounding included.
                shift[key.format(name=name)] = ((factor.double() + step).float() - factor.float()).contiguous()
        elif not lora:
            shift[name] = dense(delta).float().contiguous()
        elif isinstance(delta, LowRank):
            frozen[name] = delta
        else:
            raise BackendError(
                f"the jump of '{name}' is dense, which a LoRA run cannot hold; use a predictor of low rank",
                kind="backend-unsupported",
            )
    return shift, frozen
