"""``merge``: nothing of OpenRLHF is hooked into. Each jump becomes a model folder, from which a new trainer starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from next_backends.openrlhf.checkpoint_folders import finished_models, trainers
from next_backends.openrlhf.environment import environment
from next_backends.openrlhf.log import tail
from next_backends.openrlhf.trainer_setup import TICK, TRAINER_SIDE, TrainerSetup, Watch
from next_core.appliers.merged_model import MergedModelApplier, MergedModelConfig
from next_core.errors import BackendError, CheckpointError
from next_core.interfaces import Prediction
from next_core.sources.jumps import jump_folders
from next_core.storage.atomic import new_directory, remove_directory


class Merging:
    """One trainer process from each jump to the next; what it saves on the way is taken over while it trains."""

    keeps_start = False
    """Where RL begins is the base model, on disk already."""

    def __init__(self, setting: TrainerSetup) -> None:
        self._setting = setting
        self._model = setting.run.training.model
        self._at = self._start = self._end = 0
        self._watch: Watch | None = None
        self._masters = False

    @property
    def notes(self) -> Sequence[str]:
        what = "DeepSpeed's fp32 masters" if self._masters else "the bf16 weights that OpenRLHF saves"
        notes = [f"checkpoints are {what}"]
        if self._setting.run.control == "plain":
            notes.append("each segment began with fresh Adam moments; the plain run beside it had one segment")
        return notes

    def resume(self, made: Collection[int]) -> int:
        """The step of the newest whole model that a trainer saved, which the next one starts from; 0 for none.

        A jump there counts if it is one of those ``made`` that the run knows of.
        """
        found: dict[int, tuple[int, Path]] = {}
        for start, states in trainers(self._setting.folder).items():
            found |= {start + step: (start, model) for step, model in finished_models(states).items()}
        if not found:
            return 0
        step = max(found)
        self._at, (self._start, self._model) = step, found[step]
        history = self._setting.history
        history.forget_after(step)
        jump = history.jump_at(step)
        if jump is not None and step not in made:  # the run ended while it was made
            remove_directory(jump[0])
        elif jump is not None:
            self._model = self._jumped(step)
            if not self._model.is_dir():
                raise CheckpointError(f"{self._model} is gone, the model after the jump at step {step}; restore it")
        return step

    def start(self) -> None:
        """Take over the model that a resumed run goes on from; a trainer starts when it is told how far to go."""
        checkpoint = self._setting.history.checkpoint(self._at)
        if self._at > 0 and self._setting.run.schedule.observes(self._at) and not checkpoint.exists():
            with new_directory(checkpoint) as folder:
                self.save(self._at, folder)

    def train(self, until: int) -> None:
        """Until the model of step ``until`` is whole; a trainer that ends there has ended."""
        if until <= self._at:
            return
        watch = self._watch = self._watch or self._next(until)
        while until < self._end and until - self._start not in finished_models(self._states):
            if not watch.process.running:
                watch.process.check(f"before step {until}")
            watch.look()
            watch.read()
        if until == self._end:
            watch.end()
            watch.read()
            self.close()
            final = finished_models(self._states).get(until - self._start)
            if final is None and until != self._setting.run.steps:
                raise BackendError(f"the trainer ended without a model of step {until}; see {watch.process.log}")
            self._model = final or self._setting.folder / "final"
            self._forget_earlier()
        self._at = until

    def _next(self, until: int) -> Watch:
        """Start the trainer that goes to the next jump; beyond it only a plain run goes, which nobody watches."""
        self._start = self._at
        planned = self.stop(self._at)
        self._end = max(until, planned)
        shutil.rmtree(self._setting.states(self._start), ignore_errors=True)  # of an attempt that broke off
        steps = self._end - self._start
        self._setting.write_prompts(self._start, steps)
        options = self._setting.options(self._start, model=self._model, steps=steps, watched=until <= planned)
        return self._setting.start(options, (), None, offset=self._start)

    def stop(self, step: int) -> int:
        """Where a trainer that begins at ``step`` ends: at the next jump, or with the run."""
        run = self._setting.run
        left = run.schedule.limit - len(jump_folders(self._setting.history.jumps))
        ahead = [after for after in run.schedule.attempt_steps(run.steps) if after > step] if left > 0 else []
        return min([*ahead, run.steps])

    def _forget_earlier(self) -> None:
        """Remove what trainers before this one left: where the next one starts is known by now."""
        for path in self._setting.folder.iterdir():
            kind, _, number = path.name.rpartition("-")
            if kind in ("ckpt", "model") and number.isdigit() and int(number) < self._start:
                remove_directory(path)

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
                spent = self._states / "_actor" / f"global_step{older}"
                if spent.is_dir():  # the trainer may be looking through that folder: out of it in one go
                    remove_directory(spent.rename(self._states / f"spent-{older}"))

    def before_jump(self, folder: Path) -> None:
        """Nothing: a jump is taken back by starting from the model before it."""

    def jump(self, step: int, folder: Path, prediction: Prediction, alpha: float) -> None:
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

    def abandon(self) -> None:
        """No trainer runs between a jump and the next step."""

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
        command = [str(config.python), str(TRAINER_SIDE / "masters.py"), str(state), str(target)]
        output = self._setting.folder / "masters.log"
        with output.open("wb") as log:
            reading = subprocess.Popen(
                command, env=environment(config.python, config.env), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            while reading.poll() is None:  # the trainer goes on meanwhile, and asks for rewards
                self._watch.look() if self._watch is not None else time.sleep(TICK)
        finally:
            reading.kill()
        if reading.returncode != 0:
            raise CheckpointError(f"{state}: DeepSpeed cannot read it: {' '.join(tail(output, 3))}")


def _link(source: Path, target: Path) -> None:
    """The same bytes at a second place; a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
