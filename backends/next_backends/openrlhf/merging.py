"""``merge``: nothing of OpenRLHF is hooked into. Each jump becomes a model folder, from which a new trainer starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from next_backends.openrlhf.folders import STATES, finished_models
from next_backends.openrlhf.setting import INSIDE, Setting, Watch
from next_core.appliers.merged_model import MergedModelApplier, MergedModelConfig
from next_core.errors import BackendError, CheckpointError
from next_core.interfaces import Prediction
from next_core.storage import new_directory, remove_directory

MASTERS_TIME = 3600.0


class Merging:
    """One trainer process from each jump to the next; what it saves on the way is taken over while it trains."""

    keeps_start = False
    """Where RL begins is the base model, on disk already."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = setting.run.training.model
        self._at = self._start = self._end = 0
        self._watch: Watch | None = None
        self._masters = False

    @property
    def notes(self) -> Sequence[str]:
        what = "DeepSpeed's fp32 masters" if self._masters else "the bf16 weights that OpenRLHF saves"
        return (f"checkpoints are {what}",)

    def resume(self) -> int:
        """The step of the newest whole model that a trainer saved, which the next one starts from; 0 for none."""
        found: dict[int, tuple[int, Path]] = {}
        for states in self._setting.folder.glob("ckpt-*"):
            match = STATES.fullmatch(states.name)
            if match is not None:
                found |= {int(match[1]) + step: (step, model) for step, model in finished_models(states).items()}
        if not found:
            return 0
        step = max(found)
        self._at, self._start, self._model = step, step - found[step][0], found[step][1]
        history = self._setting.history
        history.forget_after(step)
        if history.jump_at(step) is not None:
            self._model = self._jumped(step)
            if not self._model.is_dir():
                raise CheckpointError(f"{self._model} is gone, the model after the jump at step {step}; restore it")
        if not history.checkpoint(step).exists():
            with new_directory(history.checkpoint(step)) as folder:
                self.save(step, folder)
        return step

    def start(self) -> None:
        """Nothing yet: how far the first trainer goes is known when it is told to train."""

    def train(self, until: int) -> None:
        """Until the model of step ``until`` is whole; a trainer that ends there has ended."""
        if self._watch is None:
            run = self._setting.run
            ahead = [step for step in run.schedule.attempt_steps(run.steps) if step > self._at]
            self._start, self._end = self._at, max(until, min([*ahead, run.steps]))
            shutil.rmtree(self._setting.states(self._start), ignore_errors=True)  # of an attempt that broke off
            self._setting.write_prompts(self._start)
            options = self._setting.options(self._start, model=self._model, steps=self._end - self._start)
            self._watch = self._setting.start(options, (), None)
            self._watch.offset = self._start
        watch = self._watch
        while until < self._end and until - self._start not in finished_models(self._states):
            if not watch.process.running:
                watch.process.check(f"before step {until}")
            watch.look()
        if until == self._end:
            watch.end()
            self.close()
            final = finished_models(self._states).get(until - self._start)
            if final is None and until != self._setting.run.steps:
                raise BackendError(f"the trainer ended without a model of step {until}; see {self._setting.log.path}")
            self._model = final or self._setting.folder / "final"
        self._at = until

    def save(self, step: int, folder: Path) -> None:
        """Take over the weights of ``step``: fp32 masters where DeepSpeed kept them, else the model as it was saved."""
        number = step - self._start
        model = finished_models(self._states).get(number)
        state = self._states / "_actor" / f"global_step{number}"
        self._masters = state.is_dir()
        if self._masters:
            self._read_masters(state, folder / "model.safetensors")
        elif model is not None:
            for path in (*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")):
                _link(path, folder / path.name)
        else:
            raise CheckpointError(f"{self._states} has no whole model of step {step}")
        for older, path in finished_models(self._states).items():
            if older < number:  # taken over already
                remove_directory(path)
                shutil.rmtree(self._states / "_actor" / f"global_step{older}", ignore_errors=True)

    def before_jump(self, folder: Path) -> None:
        """Nothing: a jump is taken back by starting from the model before it."""

    def jump(self, step: int, folder: Path, prediction: Prediction, alpha: float, norm: float) -> None:
        """Write the model that the next trainer starts from."""
        backbone = MergedModelConfig(backbone=self._setting.run.training.model)
        shutil.rmtree(self._jumped(step), ignore_errors=True)
        MergedModelApplier(backbone).apply(prediction, alpha, out=self._jumped(step))
        self._model = self._jumped(step)

    def take_back(self, made: int, step: int, folder: Path) -> None:
        """Start the next trainer from the model before the jump."""
        self._model = finished_models(self._states)[made - self._start]
        shutil.rmtree(self._jumped(made), ignore_errors=True)

    def rollback_is_kept(self, folder: Path) -> bool:
        return False

    def evaluate(self, split: str) -> float | None:
        """Nothing measures without a hook; OpenRLHF's own evaluations are in its log."""
        return None

    def close(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.process.stop()

    @property
    def _states(self) -> Path:
        return self._setting.states(self._start)

    def _jumped(self, step: int) -> Path:
        return self._setting.folder / f"model-{step:06d}"

    def _read_masters(self, state: Path, target: Path) -> None:
        config = self._setting.config
        command = [str(config.python), str(INSIDE / "masters.py"), str(state), str(target)]
        done = subprocess.run(
            command, env=os.environ | config.env, capture_output=True, text=True, timeout=MASTERS_TIME, check=False
        )
        if done.returncode != 0:
            raise CheckpointError(f"{state}: DeepSpeed cannot read it: {done.stderr.strip()[-300:]}")


def _link(source: Path, target: Path) -> None:
    """The same bytes at a second place; a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
