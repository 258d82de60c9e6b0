"""What all trainer processes of one run share: prompts, rewards, command line, launch settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_backends.data import is_chat, read_rows, read_splits
from next_backends.history_folder import HistoryFolder
from next_backends.openrlhf.command import gpus_needed, make_command
from next_backends.openrlhf.environment import TRAINER_SIDE, variables
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.process import TrainerProcess
from next_backends.openrlhf.reward_server import RewardServer, special_tokens
from next_core.errors import BackendError, ConfigError
from next_core.rewards import make_reward
from next_core.storage.atomic import write_text

if TYPE_CHECKING:
    from next_core.run_config import RunConfig

LOG = "trainer.log"
SETTINGS = "launch.json"
PROMPTS = "prompts.jsonl"


class TrainerSetup:
    """Prepares the trainers of a run, which work in ``folder``.

    Raises ``ConfigError`` for data that cannot be read or is too little.
    """

    def __init__(self, run: RunConfig, config: OpenRlhfConfig, out: Path) -> None:
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
        self.rewards: RewardServer | None = None
        self.updates = 1
        """Optimizer steps in one RL step."""
        self.step_ended: Callable[[int], None] = lambda step: None

    def serve_rewards(self) -> None:
        """Serve the reward of the run config, unless the config names a reward file for OpenRLHF."""
        if self.config.reward_file is None:
            if self.config.ray.address is not None:
                raise ConfigError(
                    "backend.ray.address: the nodes of a cluster cannot ask next-core for rewards; name a Python file "
                    "that they can read in backend.reward_file",
                    kind="backend-unsupported",
                )
            self.rewards = RewardServer(make_reward(self.run.training.reward), special_tokens(self.run.training.model))

    def states(self, start: int) -> Path:
        """Return the folder of the checkpoints of a trainer that began at ``start``."""
        return self.folder / f"ckpt-{start:06d}"

    def options(
        self,
        start: int,
        *,
        model: Path | None = None,
        steps: int | None = None,
        load: bool = False,
        observed: bool = True,
    ) -> list[str]:
        """Return OpenRLHF's options for a trainer that begins at ``start``; with ``steps`` it ends after as many.

        It saves what will be read: with ``jump: merge`` the model of each step that is ``observed``.
        """
        run, batch, merge = self.run, self.run.training.prompts_per_step, self.config.jump == "merge"
        save_every = (run.schedule.every if observed else None) if merge else run.save_every
        reward = self.config.reward_file or (self.rewards.url if self.rewards is not None else "http://127.0.0.1:0/")
        options = {
            "--actor.model_name_or_path": ("training.model", model or run.training.model),
            "--ckpt.disable_ds": ("save_every", merge and not self.config.masters),
            "--ckpt.load_enable": ("`next-core run`", load),
            "--ckpt.max_num": ("save_every", 10**6 if merge else 3),  # MergeMode removes what it has read
            "--ckpt.output_dir": ("`next-core run --out`", self.folder / "final"),
            "--ckpt.path": ("`next-core run --out`", self.states(start)),
            "--ckpt.save_hf": ("backend.save_hf", merge or self.config.save_hf),
            "--ckpt.save_steps": ("save_every", -1 if save_every is None else save_every),
            "--data.apply_chat_template": ("training.data", is_chat(self.rows)),
            "--data.max_samples": ("steps", (len(self.rows) // batch if steps is None else steps) * batch),
            "--data.prompt_dataset": ("training.data.train", self.folder / PROMPTS),
            "--reward.remote_url": ("training.reward", reward),
            "--train.num_episodes": ("steps", run.steps if steps is None else 1),
            "--train.seed": ("seed", run.seed + start),  # a new trainer draws other samples, in another order
        }
        return make_command(run, self.config, options)

    def write_prompts(self, start: int, steps: int | None = None) -> None:
        """Write the training prompts, those of step ``start`` first; with ``steps``, as many as these need."""
        batch = self.run.training.prompts_per_step
        count = len(self.rows) if steps is None else steps * batch
        rows = (self.rows[(start * batch + number) % len(self.rows)] for number in range(count))
        lines = (json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PROMPTS, "".join(lines))

    def launch(
        self, scratch: Path, options: Sequence[str], hooks: Sequence[str], control: dict[str, Any] | None
    ) -> TrainerProcess:
        """Start OpenRLHF with hooks that connect to ``control``; ``scratch`` is for files that end with it."""
        workers = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        settings = {
            "ray": _ray(self.config, scratch / "ray"),
            "env": workers | self.config.env,
            "gpus": gpus_needed(self.run, self.config),
            "hooks": list(hooks),
            "control": control,
        }
        path = self.folder / SETTINGS
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # it holds a key
            json.dump(settings, file)
        command = [str(self.config.python), str(TRAINER_SIDE / "launch.py"), str(path), *options]
        return TrainerProcess(command, variables(self.config), self.folder / LOG, scratch)

    def step_logged(self, step: int, metrics: dict[str, float], check: bool = False) -> None:
        """Record the metrics of a step. Raises ``BackendError`` if the engines should be ``check``-ed and sample from
        other weights than the actor's.
        """
        self.history.log(step, {key: value for key, value in metrics.items() if math.isfinite(value)})
        self.step_ended(step)
        bound, found = self.config.max_vllm_kl, metrics.get("vllm_kl")
        if check and bound is not None and found is not None and not abs(found) <= bound:
            raise BackendError(
                f"step {step}: vllm_kl is {found:.2g}, above the bound {bound:g}: the engines sample from other "
                "weights than the actor's. If the cause is their precision, raise backend.max_vllm_kl",
                kind="backend-failed",
            )

    def close(self) -> None:
        """Stop serving rewards."""
        if self.rewards is not None:
            self.rewards.close()
            self.rewards = None


def _ray(config: OpenRlhfConfig, folder: Path) -> dict[str, Any]:
    """Return the arguments of ``ray.init``: a running cluster, or a Ray of the trainer's own in ``folder``."""
    ray = config.ray
    if ray.address is not None:
        return {"address": ray.address}
    memory = None if ray.object_store_mib is None else ray.object_store_mib * 2**20
    limits = {"num_gpus": ray.num_gpus, "num_cpus": ray.num_cpus, "object_store_memory": memory}
    local = {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
    return local | {key: value for key, value in limits.items() if value is not None}
