"""The real OpenRLHF as a backend."""

from collections.abc import Callable, Sequence
from pathlib import Path

from next_backends.external.external_backend import ExternalBackend
from next_backends.external.trainer import Trainer
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.openrlhf_setup import OpenRlhfSetup, parse
from next_backends.openrlhf.saved_states import LATEST, newest_state, remove_old_models
from next_core.cycle.journal import JOURNAL, read_journal, valid_jumps
from next_core.errors import unsupported
from next_core.sources.jumps import jump_folders
from next_core.storage.atomic import write_text
from next_core.storage.manifest import check_manifest


class OpenRlhfBackend(ExternalBackend):
    """Drives OpenRLHF 0.11.2 in the environment of ``python``; nothing of it is imported here.

    With ``jump: swap`` one trainer gets new weights at each jump; with ``jump: restart`` a new trainer, with fresh
    Adam moments, begins at each jump. Their logs and own checkpoints are under ``trainer/`` in the run folder.
    """

    name = "openrlhf"
    config_class = OpenRlhfConfig
    setup_class = OpenRlhfSetup
    program = "openrlhf.cli.train_ppo_ray"

    def check_options(self) -> None:
        args = parse(self.config, self._setup.options(0))
        batch = args["rollout"]["batch_size"] * args["rollout"]["n_samples_per_prompt"]
        self._setup.updates = max(1, batch // args["train"]["batch_size"]) * args["train"]["max_epochs"]

    def continue_from(self, begun: int, step: int) -> None:
        if begun == step:
            check_manifest(self._setup.history.checkpoint(step), contents=True)
            self._restart(step)
            return
        self._setup.write_prompts(begun)
        write_text(self._setup.states(begun) / "_actor" / LATEST, f"global_step{step}")  # it may name another state
        self._trainer = Trainer(self._setup, begun, load=True)
        self._trainer.ask("load", folder=None, shifts=[], adapters=self._adapters())

    def follow_steps(self, windows: Sequence[int]) -> None:
        if self._setup.updates > 1:
            raise unsupported(
                f"an RL step makes {self._setup.updates} optimizer steps, and step scaling compares single ones; leave "
                "--train.max_epochs out of backend.extra_args, or choose a predictor that jumps, such as "
                "'adaptive-secant'"
            )
        super().follow_steps(windows)

    def state_of(self, begun: int, step: int) -> Path:
        return self._setup.states(begun) / "_actor" / f"global_step{step}"

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        super().train(until, step_ended)
        remove_old_models(self._setup.folder, self.config.keep_hf)

    def continue_with_jump(self, step: int) -> None:
        if self.config.jump == "restart" and step < self._setup.run.steps:
            self._restart(step)
        else:
            self._load(step)

    def generated(self, split: str) -> float:
        pairs = [[row["prompt"], str(row["answer"])] for row in self._setup.splits[split]]
        return float(self._running.ask("greedy", pairs=pairs))

    @property
    def notes(self) -> Sequence[str]:
        notes = ["checkpoints are DeepSpeed's fp32 masters", *super().notes]
        if self.config.jump == "restart" and self._setup.run.control == "plain":
            notes.append("each restart began with fresh Adam moments; the plain run did not restart")
        return notes

    def resume_point(self) -> tuple[int, int] | None:
        """Return where the trainer to resume began and the step to resume at; None if nothing was saved.

        ``restart`` prefers the newest jump to a trainer's state that is no newer: its checkpoint and shift are enough.
        A jump that is missing in the journal was interrupted.
        """
        state, history = newest_state(self._setup.folder), self._setup.history
        journal = history.path / JOURNAL
        if self.config.jump == "restart" and journal.exists():
            known = {jump["step"] for jump in valid_jumps(read_journal(journal)) if jump["accepted"]}
            made = known & {jump["step"] for _, jump in jump_folders(history.jumps)}
            newest = max((step for step in made if history.checkpoint(step).is_dir()), default=0)
            if newest > 0 and (state is None or newest >= state[1]):
                return newest, newest
        return state

    def _restart(self, step: int) -> None:
        """Replace the trainer by one that begins at ``step`` with the weights of that step and its jump."""
        self._abandon()
        self._setup.write_prompts(step)
        self._trainer = Trainer(self._setup, step)
        self._load(step, schedule=step * self._setup.updates)
