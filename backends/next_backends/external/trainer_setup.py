"""What all trainer processes of one run share: prompts, rewards, options, launch settings."""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import next_core
from next_backends import sharding
from next_backends.data import read_rows, read_splits
from next_backends.external.environment import variables
from next_backends.external.external_config import RaySettings
from next_backends.external.process import TrainerProcess
from next_backends.external.reward_server import RewardProcess
from next_backends.history_folder import HistoryFolder
from next_core.backend import LoggedReward
from next_core.config import with_model_folder
from next_core.errors import invalid_value
from next_core.plugins import make_chosen
from next_core.run_config import RunConfig
from next_core.sources.metrics import METRICS, by_step, read_log
from next_core.step_predictor import StepPredictor

LOG = "trainer.log"
SHARED_SIDE = Path(__file__).parent / "trainer_side"  # What every ``trainer_side`` imports


class TrainerSetup(ABC):
    """Prepares the trainers of a run, which work in ``folder``.

    Raises ``ConfigError`` for data that cannot be read or is too little.
    """

    trainer_side: ClassVar[Path]  # The folder of ``launch.py`` and of what it imports

    def __init__(self, run: RunConfig, config: Any, out: Path) -> None:
        self.check_run(run, config)
        run = with_model_folder(run)
        self.run, self.config, self.folder = run, config, out / "trainer"
        self.history = HistoryFolder(out)
        self.rows = read_rows(run.training.data.train)
        self.splits = read_splits(run.training)
        if len(self.rows) < run.training.prompts_per_step:
            raise invalid_value(
                f"{run.training.data.train} has {len(self.rows)} prompts, but one step needs "
                f"{run.training.prompts_per_step}; add prompts or lower training.prompts_per_step"
            )
        self.rewards: RewardProcess | None = None
        self.updates = 1  # Optimizer steps in one RL step
        self.step_ended: Callable[[int], None] = lambda step: None
        self.scales = scales_steps(run)
        self.logged: list[LoggedReward] = []  # The rewards of the steps so far

    @abstractmethod
    def check_run(self, run: RunConfig, config: Any) -> None:
        """Raise ``ConfigError`` for a run that this backend does not support."""

    @abstractmethod
    def options(self, start: int, load: bool = False) -> list[str]:
        """Return the options of a trainer that begins at ``start``, or resumes there with ``load``."""

    @abstractmethod
    def write_prompts(self, start: int) -> None:
        """Write the prompts that a trainer which begins at ``start`` reads."""

    @abstractmethod
    def states(self, start: int) -> Path:
        """Return the folder of the checkpoints of a trainer that began at ``start``."""

    def launch_settings(self, start: int, path: str) -> dict[str, Any]:
        """Return what ``launch.py`` reads besides Ray's settings and the socket; ``path`` is its PYTHONPATH."""
        return {}

    def environment(self) -> dict[str, str]:
        """Return the variables of a trainer's processes."""
        return variables(self.config)

    def launch(self, scratch: Path, control: str, start: int, load: bool) -> TrainerProcess:
        """Start a trainer that connects to the socket ``control``.

        ``scratch``, closed to other users, is for files that end with it.
        """
        env = self.environment()
        paths = (shared_modules(scratch), str(self.trainer_side), str(SHARED_SIDE), env.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        settings = {"control": {}, "ray": local_ray(self.config.ray, scratch / "ray")}
        settings |= self.launch_settings(start, env["PYTHONPATH"])
        settings["control"]["address"] = control
        (scratch / "launch.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [self.config.python, self.trainer_side / "launch.py", scratch / "launch.json"]
        options = self.options(start, load)
        return TrainerProcess([*map(str, command), *options], env, self.folder / LOG, scratch)

    def serve_rewards(self) -> None:
        """Serve the reward of the run config."""
        self.rewards = RewardProcess(self.run.training)

    def step_logged(self, step: int, metrics: dict[str, float], check: bool = False) -> None:
        """Record the metrics of a step; ``check`` is whether the engines got weights since the one before."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.history.log(step, finite)
        self._add_reward(step, finite)
        self.step_ended(step)

    def read_rewards(self, until: int) -> None:
        """Read the rewards of the steps up to ``until``, at which a run is resumed."""
        for step, metrics in sorted(by_step(read_log(self.history.path / METRICS)).items()):
            if step <= until:
                self._add_reward(step, metrics)

    def _add_reward(self, step: int, metrics: Mapping[str, Any]) -> None:
        mean, spread, count = (metrics.get(f"rollout/{name}") for name in ("reward_mean", "reward_std", "num_samples"))
        if mean is not None and spread is not None and count:
            self.logged.append(LoggedReward(step, 1, mean, spread / math.sqrt(count)))

    def close(self) -> None:
        """Stop serving rewards."""
        if self.rewards is not None:
            self.rewards.close()
            self.rewards = None


def shared_modules(scratch: Path) -> str:
    """Return a folder with what ``trainer_side`` imports of ours, and nothing else of this environment."""
    folder = scratch / "modules"
    (folder / "next_backends").mkdir(parents=True)
    (folder / "next_core").symlink_to(Path(next_core.__file__).parent)
    (folder / "next_backends" / "sharding.py").symlink_to(sharding.__file__)
    return str(folder)


def scales_steps(run: RunConfig) -> bool:
    """Whether the run's predictor scales steps, so that there are no jumps."""
    return isinstance(make_chosen("predictor", run.predictor), StepPredictor)


def local_ray(ray: RaySettings, folder: Path) -> dict[str, Any]:
    """Return the arguments of ``ray.init`` for a Ray of the trainer's own in ``folder``."""
    memory = None if ray.object_store_mib is None else ray.object_store_mib * 2**20
    limits = {"num_gpus": ray.num_gpus, "num_cpus": ray.num_cpus, "object_store_memory": memory}
    local = {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
    return local | {key: value for key, value in limits.items() if value is not None}
