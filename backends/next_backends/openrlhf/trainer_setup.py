"""What all trainer processes of one run share: prompts, rewards, command line, launch settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import next_core
from next_backends import sharding
from next_backends.data import is_chat, read_rows, read_splits
from next_backends.history_folder import HistoryFolder
from next_backends.openrlhf.command import gpus_needed, make_command, scales_steps
from next_backends.openrlhf.environment import TRAINER_SIDE, variables
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.process import TrainerProcess
from next_backends.openrlhf.reward_server import RewardProcess
from next_core.backend import LoggedReward
from next_core.config import with_model_folder
from next_core.errors import BackendError, ConfigError
from next_core.sources.metrics import METRICS, by_step, read_log
from next_core.storage.atomic import write_text

if TYPE_CHECKING:
    from next_core.run_config import RunConfig

LOG = "trainer.log"
PROMPTS = "prompts.jsonl"


class TrainerSetup:
    """Prepares the trainers of a run, which work in ``folder``.

    Raises ``ConfigError`` for data that cannot be read or is too little.
    """

    def __init__(self, run: RunConfig, config: OpenRlhfConfig, out: Path) -> None:
        run = with_model_folder(run)
        self.run, self.config, self.folder = run, config, out / "trainer"
        self.history = HistoryFolder(out)
        self.rows = read_rows(run.training.data.train)
        self.splits = read_splits(run.training)
        if len(self.rows) < run.training.prompts_per_step:
            raise ConfigError(
                f"{run.training.data.train} has {len(self.rows)} prompts, but one step needs "
                f"{run.training.prompts_per_step}; add prompts or lower training.prompts_per_step",
                kind="config-invalid-value",
            )
        self.rewards: RewardProcess | None = None
        self.updates = 1
        """Optimizer steps in one RL step."""
        self.step_ended: Callable[[int], None] = lambda step: None
        self.scales = scales_steps(run)
        self.logged: list[LoggedReward] = []
        """The rewards of the steps so far."""

    def serve_rewards(self) -> None:
        """Serve the reward of the run config, unless the config names a reward file for OpenRLHF."""
        if self.config.reward_file is None:
            self.rewards = RewardProcess(self.run.training)

    def states(self, start: int) -> Path:
        """Return the folder of the checkpoints of a trainer that began at ``start``."""
        return self.folder / f"ckpt-{start:06d}"

    def options(self, start: int, load: bool = False) -> list[str]:
        """Return OpenRLHF's options for a trainer that begins at ``start``, or resumes with ``load``."""
        run, batch = self.run, self.run.training.prompts_per_step
        reward = self.config.reward_file or (self.rewards.url if self.rewards is not None else "http://127.0.0.1:0/")
        options = {
            "--actor.model_name_or_path": ("training.model", run.training.model),
            "--ckpt.load_enable": ("`next-core run`", load),
            # Step scaling saves first, into the state's folder: OpenRLHF counts it when it makes room for that state.
            "--ckpt.max_num": ("save_every", 4 if self.scales else 3),
            "--ckpt.output_dir": ("`next-core run --out`", self.folder / "final"),
            "--ckpt.path": ("`next-core run --out`", self.states(start)),
            "--ckpt.save_hf": ("backend.save_hf", self.config.save_hf),
            "--ckpt.save_steps": ("save_every", -1 if run.save_every is None else run.save_every),
            "--data.apply_chat_template": ("training.data", is_chat(self.rows)),
            "--data.max_samples": ("steps", len(self.rows) // batch * batch),
            "--data.prompt_dataset": ("training.data.train", self.folder / PROMPTS),
            "--reward.remote_url": ("training.reward", reward),
            "--train.num_episodes": ("steps", run.steps),  # more than enough: the run ends when its steps are done
            "--train.seed": ("seed", run.seed + start),  # a new trainer draws other samples, in another order
        }
        return make_command(run, self.config, options)

    def write_prompts(self, start: int) -> None:
        """Write the training prompts, those of step ``start`` first."""
        first = start * self.run.training.prompts_per_step % len(self.rows)
        rows = self.rows[first:] + self.rows[:first]
        lines = (json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PROMPTS, "".join(lines))

    def launch(self, scratch: Path, control: str, start: int, load: bool) -> TrainerProcess:
        """Start OpenRLHF with hooks that connect to the socket ``control``.

        ``scratch``, closed to other users, is for files that end with it.
        """
        env = variables(self.config)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (shared_modules(scratch), env.get("PYTHONPATH"))))
        workers = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        settings = {
            "ray": _ray(self.config, scratch / "ray"),
            "env": workers | self.config.env | {"PYTHONPATH": env["PYTHONPATH"]},
            "gpus": gpus_needed(self.run, self.config),
            "control": {
                "address": control,
                "start": start,
                "seed": self.run.seed + start,
                "scheduler_steps": self.run.steps * self.updates,
            },
        }
        path = scratch / "launch.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        command = [str(self.config.python), str(TRAINER_SIDE / "launch.py"), str(path), *self.options(start, load)]
        return TrainerProcess(command, env, self.folder / LOG, scratch)

    def step_logged(self, step: int, metrics: dict[str, float], check: bool = False) -> None:
        """Record the metrics of a step. Raises ``BackendError`` if the engines should be ``check``-ed and sample from
        other weights than the actor's.
        """
        self.history.log(step, {key: value for key, value in metrics.items() if math.isfinite(value)})
        self._add_reward(step, metrics)
        self.step_ended(step)
        bound, found = self.config.max_vllm_kl, metrics.get("vllm_kl")
        if check and bound is not None and found is not None and not abs(found) <= bound:
            raise BackendError(
                f"step {step}: vllm_kl is {found:.2g}, above the bound {bound:g}: the engines sample from other "
                "weights than the actor's. If the cause is their precision, raise backend.max_vllm_kl",
                kind="backend-failed",
            )

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


def _ray(config: OpenRlhfConfig, folder: Path) -> dict[str, Any]:
    """Return the arguments of ``ray.init`` for a Ray of the trainer's own in ``folder``."""
    ray = config.ray
    memory = None if ray.object_store_mib is None else ray.object_store_mib * 2**20
    limits = {"num_gpus": ray.num_gpus, "num_cpus": ray.num_cpus, "object_store_memory": memory}
    local = {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
    return local | {key: value for key, value in limits.items() if value is not None}
