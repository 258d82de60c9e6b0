"""verl as a backend: a trainer in its own environment, which pauses and takes new weights."""

from collections.abc import Sequence
from pathlib import Path

from next_backends.external.environment import ask
from next_backends.external.external_backend import ExternalBackend
from next_backends.external.trainer import Trainer
from next_backends.verl.verl_config import VerlConfig
from next_backends.verl.verl_setup import TRAINER_SIDE, VerlSetup
from next_core.errors import unsupported
from next_core.types import Space

VERSION = "0.9.1"  # The release of verl that this backend drives


class VerlBackend(ExternalBackend):
    """Drives verl 0.9.1 in the environment of ``python``; nothing of it is imported here. Experimental.

    One trainer, FSDP2, gets new weights at each jump; its Adam moments are kept. Its log and its own checkpoints are
    under ``trainer/`` in the run folder.
    """

    name = "verl"
    config_class = VerlConfig
    setup_class = VerlSetup
    program = "verl.trainer.main_ppo"

    def check_options(self) -> None:
        ask(self.config, "verl", VERSION, TRAINER_SIDE / "composed.py", self._setup.options(0))

    def check_jumps(self, space: Space | None) -> None:
        if self._setup.run.training.lora is not None and space != "factors":
            raise unsupported(
                "a jump in merged space becomes a second adapter, which verl cannot train next to the first; use a "
                "predictor in space: factors, such as secant"
            )

    def resume_point(self) -> tuple[int, int] | None:
        folders = self._setup.states(0).glob("global_step_*/data.pt")  # written last
        steps = [int(file.parent.name.removeprefix("global_step_")) for file in folders]
        return (0, max(steps)) if steps else None

    def continue_from(self, begun: int, step: int) -> None:
        self._trainer = Trainer(self._setup, step, load=True)

    def state_of(self, begun: int, step: int) -> Path:
        return self._setup.states(0) / f"global_step_{step}" / "actor" / "next-core"

    def generated(self, split: str) -> float:
        return float(self._running.ask("validate")[split])

    @property
    def notes(self) -> Sequence[str]:
        return ["the backend for verl is experimental", *super().notes]
