"""``jump: merge``: a new trainer for each jump, started from a model with the jump merged in. No hooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from next_backends.openrlhf.checkpoint_folders import finished_models, trainers
from next_backends.openrlhf.environment import TRAINER_SIDE, variables
from next_backends.openrlhf.log import tail
from next_backends.openrlhf.trainer import TICK, Trainer
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.appliers.merged_model import MergedModelApplier, MergedModelConfig
from next_core.errors import BackendError, CheckpointError
from next_core.interfaces import Prediction
from next_core.sources.jumps import jump_folders
from next_core.storage.atomic import new_directory, remove_directory


class MergeMode:
    """One trainer from each jump to the next; its checkpoints are read while it trains."""

    keeps_start = False
    """The run starts from the base model, which is on disk already."""

    def __init__(self, setup: TrainerSetup) -> None:
        self._setup = setup
        self._model = setup.run.training.model
        self._at = self._start = self._end = 0
        self._trainer: Trainer | None = None
        self._masters = False

    @property
    def notes(self) -> Sequence[str]:
        weights = "DeepSpeed's fp32 masters" if self._masters else "the bf16 weights that OpenRLHF saves"
        notes = [f"checkpoints are {weights}"]
        if self._setup.run.control == "plain":
            notes.append("each segment began with fresh Adam moments; the plain run had one segment")
        return notes

    def resume(self, known_jumps: Collection[int]) -> int:
        """Choose the newest whole model of a trainer to resume from. Returns its step; 0 if there is none.

        ``known_jumps`` are the steps of the jumps in the run's journal; a jump at the step that is missing there was
        interrupted.
        """
        found: dict[int, tuple[int, Path]] = {}
        for start, states in trainers(self._setup.folder).items():
            found |= {start + step: (start, model) for step, model in finished_models(states).items()}
        if not found:
            return 0
        step = self._at = max(found)
        self._start, self._model = found[step]
        history = self._setup.history
        history.forget_after(step)
        jump = history.jump_at(step)
        if jump is not None and step not in known_jumps:
            remove_directory(jump[0])
        elif jump is not None:
            self._model = self._jumped(step)
            if not self._model.is_dir():
                raise CheckpointError(
                    f"{self._model}, the model after the jump at step {step}, is missing; restore it",
                    kind="checkpoint-not-found",
                )
        return step

    def start(self) -> None:
        """Read the checkpoint that a resumed run begins with. ``train`` starts the trainer."""
        checkpoint = self._setup.history.checkpoint(self._at)
        if self._at > 0 and self._setup.run.schedule.observes(self._at) and not checkpoint.exists():
            with new_directory(checkpoint) as folder:
                self.save(self._at, folder)

    def train(self, until: int) -> None:
        """Train until the model of step ``until`` is whole. A trainer that ends there has then ended."""
        if until <= self._at:
            return
        trainer = self._trainer = self._trainer or self._next_trainer(until)
        while until < self._end and until - self._start not in finished_models(self._states):
            if not trainer.process.running:
                trainer.process.check(f"before step {until}")
            trainer.wait()
            trainer.read_log()
        if until == self._end:
            trainer.wait_for_end()
            trainer.read_log()
            self.close()
            final = finished_models(self._states).get(until - self._start)
            if final is None and until != self._setup.run.steps:
                raise BackendError(
                    f"the trainer ended without a model of step {until}; see {trainer.process.log}",
                    kind="backend-failed",
                )
            self._model = final or self._setup.folder / "final"
            self._remove_earlier()
        self._at = until

    def stop(self, step: int) -> int:
        """Return the step at which a trainer that begins at ``step`` ends: that of the next jump, or the run's last."""
        run = self._setup.run
        left = run.schedule.limit - len(jump_folders(self._setup.history.jumps))
        ahead = [after for after in run.schedule.attempt_steps(run.steps) if after > step] if left > 0 else []
        return min([*ahead, run.steps])

    def save(self, step: int, folder: Path) -> None:
        """Copy the weights of ``step``: fp32 masters if DeepSpeed saved them, else the model as OpenRLHF saved it."""
        number = step - self._start
        models = finished_models(self._states)
        state = self._states / "_actor" / f"global_step{number}"
        self._masters = state.is_dir()
        if self._masters:
            self._read_masters(state, folder / "model.safetensors")
        elif number in models:
            for pattern in ("*.safetensors", "*.safetensors.index.json"):
                for path in models[number].glob(pattern):
                    _link(path, folder / path.name)
        else:
            raise CheckpointError(
                f"{self._states} has no complete model of step {step}; restore it", kind="checkpoint-incomplete"
            )
        for older in (older for older in models if older < number):
            remove_directory(models[older])
            spent = self._states / "_actor" / f"global_step{older}"
            if spent.is_dir():  # moved out at once, because the trainer may be listing that folder
                remove_directory(spent.rename(self._states / f"spent-{older}"))

    def save_for_rollback(self, folder: Path) -> None:
        """Save nothing: the model before the jump is kept."""

    def can_roll_back(self, folder: Path) -> bool:
        return False

    def jump(self, step: int, prediction: Prediction, alpha: float) -> None:
        """Write the model that the next trainer starts from."""
        shutil.rmtree(self._jumped(step), ignore_errors=True)
        applier = MergedModelApplier(MergedModelConfig(backbone=self._setup.run.training.model))
        applier.apply(prediction, alpha, out=self._jumped(step))
        self._model = self._jumped(step)

    def undo(self, jumped: int, folder: Path | None = None) -> None:
        """Start the next trainer from the model before the jump."""
        self._model = finished_models(self._states)[jumped - self._start]
        shutil.rmtree(self._jumped(jumped), ignore_errors=True)

    def evaluate(self, split: str) -> float | None:
        """Return None: measuring accuracy needs a hook."""
        return None

    def abandon(self) -> None:
        """Do nothing: no trainer runs between a jump and the next step."""

    def close(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.kill()

    @property
    def _states(self) -> Path:
        return self._setup.states(self._start)

    def _jumped(self, step: int) -> Path:
        return self._setup.folder / f"model-{step:06d}"

    def _next_trainer(self, until: int) -> Trainer:
        """Start the trainer that goes to the next jump; only a plain run, which is not observed, goes beyond it."""
        self._start, planned = self._at, self.stop(self._at)
        self._end = max(until, planned)
        shutil.rmtree(self._states, ignore_errors=True)  # of an interrupted attempt
        steps = self._end - self._start
        self._setup.write_prompts(self._start, steps)
        options = self._setup.options(self._start, model=self._model, steps=steps, observed=until <= planned)
        return Trainer(self._setup, options, offset=self._start)

    def _remove_earlier(self) -> None:
        """Remove the files of earlier trainers; nothing starts from them any more."""
        for path in self._setup.folder.iterdir():
            kind, _, number = path.name.rpartition("-")
            if kind in ("ckpt", "model") and number.isdigit() and int(number) < self._start:
                remove_directory(path)

    def _read_masters(self, state: Path, target: Path) -> None:
        config, output = self._setup.config, self._setup.folder / "masters.log"
        command = [str(config.python), str(TRAINER_SIDE / "masters.py"), str(state), str(target)]
        with output.open("wb") as log:
            reader = subprocess.Popen(command, env=variables(config), stdout=log, stderr=subprocess.STDOUT)
        try:
            while reader.poll() is None:  # the trainer still runs and asks for rewards
                self._trainer.wait() if self._trainer is not None else time.sleep(TICK)
        finally:
            reader.kill()
        if reader.returncode != 0:
            raise CheckpointError(
                f"{state}: DeepSpeed cannot read it: {' '.join(tail(output, 3))}; restore it", kind="checkpoint-damaged"
            )


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
