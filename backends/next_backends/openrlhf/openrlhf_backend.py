"""The real OpenRLHF as the predict-extend cycle sees it: a trainer in an environment of its own, segment by segment."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from next_backends.history_folder import JumpAdapter
from next_backends.openrlhf.environment import ask_parser, check_python
from next_backends.openrlhf.merging import Merging
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.pausing import Pausing
from next_backends.openrlhf.run_checks import check_run
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.appliers.jump_adapter import adapter_settings, adapter_tensors
from next_core.backend import Backend
from next_core.cycle.journal import JOURNAL, read_journal, valid_jumps
from next_core.errors import BackendError, describe
from next_core.interfaces import Applied, Prediction
from next_core.interfaces.prediction import FactorStep, weight_deltas
from next_core.mathematics.low_rank import LowRank, dense
from next_core.sources.adapter_source import JUMP_PREFIX, SHIFT_KEYS, PeftAdapterSource, PeftAdapterSourceConfig
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from next_core.storage.atomic import new_directory, remove_directory

if TYPE_CHECKING:
    from next_core.run_config import RunConfig


class OpenRlhfBackend(Backend):
    """Drives OpenRLHF 0.11.2 in the environment that ``python`` names; nothing of it is imported here.

    The trainer's processes, logs and own checkpoints are under ``trainer/`` in the run folder.
    """

    name = "openrlhf"
    config_class = OpenRlhfConfig
    in_process = False

    def __init__(self, config: OpenRlhfConfig) -> None:
        super().__init__(config)
        self._setting: TrainerSetup
        self._mode: Pausing | Merging
        self._source: PeftAdapterSource | FullModelSource | None = None
        self._resumed = False
        self._at = 0
        self._ending = contextlib.ExitStack()

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Check all that can be checked without a GPU, by OpenRLHF's own parser as well. The trainer starts later."""
        self._plan(run, out)
        check_python(self.config)
        setting = self._setting
        self._ending.callback(setting.close)
        self._ending.callback(self._mode.close)
        setting.serve_rewards()
        known = ask_parser(self.config.python, setting.options(0), self.config.env)["args"]
        batch = known["rollout"]["batch_size"] * known["rollout"]["n_samples_per_prompt"]
        setting.updates = max(1, batch // known["train"]["batch_size"]) * known["train"]["max_epochs"]
        if not resume:
            setting.history.clear()
            return 0
        self._resumed = True
        journal = out / JOURNAL
        jumps = valid_jumps(read_journal(journal)) if journal.exists() else []
        self._at = self._mode.resume({jump["step"] for jump in jumps if jump["accepted"]})
        return self._at

    def start(self) -> None:
        """The trainer's own start takes long; where RL begins is kept, once."""
        self._mode.start()
        if self._mode.keeps_start and not self._resumed:
            self.observe(0)
            self.source()  # what cannot be read back is said now, not at the first jump

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        self._setting.step_ended = step_ended
        self._mode.train(until)
        self._at = until

    def observe(self, step: int) -> None:
        with new_directory(self._setting.history.checkpoint(step), overwrite=True) as folder:
            self._mode.save(step, folder)

    def source(self) -> PeftAdapterSource | FullModelSource:
        path = self._setting.history.checkpoints
        if self._source is not None:
            self._source.refresh()
        elif self._setting.run.training.lora is not None:
            self._source = PeftAdapterSource(PeftAdapterSourceConfig(path=path))
        else:
            backbone = None if self._mode.keeps_start else self._setting.run.training.model
            self._source = FullModelSource(FullModelSourceConfig(path=path, backbone=backbone))
        return self._source

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> JumpApplied:
        step, history = prediction.step, self._setting.history
        folder = history.next_jump()
        shift, beside = split_updates(prediction, alpha, lora=self._setting.run.training.lora is not None)
        adapter = None
        if beside:
            settings = adapter_settings(beside) | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
            adapter = JumpAdapter(f"{JUMP_PREFIX}{int(folder.name)}", json.dumps(settings), adapter_tensors(beside))
        more = self._mode.before_jump if keep else None
        history.write_jump(folder, step, alpha, shift=shift, adapter=adapter, more=more)
        try:
            self._mode.jump(step, folder, prediction, alpha)
        except BaseException as error:
            remove_directory(folder)
            try:
                self._mode.take_back(step, step, folder)
            except Exception as again:
                error.add_note(f"nor could the weights from before it be put back: {describe(again)}")
                self._mode.abandon()
            raise
        return JumpApplied(self, folder, step)

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, JumpApplied)
        self._setting.history.withdraw(applied.folder, step)
        self._mode.take_back(applied.step, step, applied.folder)

    @property
    def step(self) -> int:
        """The step that ended last."""
        return self._at

    def active_jump(self, step: int) -> Applied | None:
        found = self._setting.history.jump_at(step)
        if found is None or not self._mode.rollback_is_kept(found[0]):
            return None
        return JumpApplied(self, found[0], step)

    def evaluate(self, split: str = "validation") -> float | None:
        return self._mode.evaluate(split)

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        found = self.evaluate(split)
        sampled = self._setting.run.training.evaluation == "likelihood"
        return {} if found is None else {"sampled" if sampled else "greedy": found}

    @property
    def notes(self) -> Sequence[str]:
        return self._mode.notes

    def close(self) -> None:
        self._ending.close()

    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        self._plan(run, out)
        steps = self._mode.stop(0) if isinstance(self._mode, Merging) else None
        return {"command line": ["openrlhf.cli.train_ppo_ray", *self._setting.options(0, steps=steps)]}

    def _plan(self, run: RunConfig, out: Path) -> None:
        check_run(run, self.config)
        self._setting = TrainerSetup(run, self.config, out)
        self._mode = Merging(self._setting) if self.config.jump == "merge" else Pausing(self._setting)


class JumpApplied(Applied):
    """A jump that a trainer went on from, undone from what lies in the run folder."""

    def __init__(self, backend: OpenRlhfBackend, folder: Path, step: int) -> None:
        self._backend, self.folder, self.step = backend, folder, step

    def rollback(self) -> None:
        self._backend.rollback(self, self._backend.step)


def split_updates(prediction: Prediction, alpha: float, lora: bool) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """What trains moves by (fp32, by the names of a shift file), and what is to stand beside it."""
    shift: dict[str, Tensor] = {}
    beside: dict[str, LowRank] = {}
    for name, moved in weight_deltas(prediction, alpha):
        if isinstance(moved, FactorStep):
            for key, at, delta in zip(SHIFT_KEYS, (moved.at.A, moved.at.B), (moved.dA, moved.dB), strict=True):
                shift[key.format(name=name)] = ((at.double() + delta).float() - at.float()).contiguous()
        elif not lora:
            shift[name] = dense(moved).float().contiguous()
        elif isinstance(moved, LowRank):
            beside[name] = moved
        else:
            raise BackendError(f"a dense jump of '{name}' cannot be put beside a LoRA adapter")
    return shift, beside
