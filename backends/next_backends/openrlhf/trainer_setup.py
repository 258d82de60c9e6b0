"""What every trainer process of one run has in common: its data, its rewards, its command line, its log."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_backends.data import is_chat, read_rows, read_splits
from next_backends.history_folder import HistoryFolder
from next_backends.openrlhf.command import Places, Segment, gpus_needed, make_command
from next_backends.openrlhf.environment import environment
from next_backends.openrlhf.known_options import check_options
from next_backends.openrlhf.log import LogReader
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.process import TrainerProcess
from next_backends.openrlhf.reward_server import RewardServer, special_tokens
from next_core.errors import BackendError, ConfigError
from next_core.rewards import make_reward
from next_core.storage.atomic import write_text

if TYPE_CHECKING:
    from next_core.run_config import RunConfig

TRAINER_SIDE = Path(__file__).parent / "trainer_side"
LOG = "trainer.log"
SETTINGS = "launch.json"
PROMPTS = "prompts.jsonl"
TICK = 0.05
"""Seconds between looks at the trainer."""


class TrainerSetup:
    """Raises ``ConfigError`` for data or a reward that cannot be read. ``folder`` is the trainer's own."""

    def __init__(self, run: RunConfig, config: OpenRlhfConfig, out: Path) -> None:
        self.run, self.config, self.folder = run, config, out / "trainer"
        self.history = HistoryFolder(out)
        self.rows = read_rows(run.training.data.train)
        self.splits = read_splits(run.training)
        if len(self.rows) < run.training.prompts_per_step:
            raise ConfigError(
                f"{run.training.data.train} has {len(self.rows)} prompts, fewer than the "
                f"{run.training.prompts_per_step} of one step"
            )
        self.rewards: RewardServer | None = None
        self.updates = 1
        """Optimizer steps in one RL step."""
        self.step_ended: Callable[[int], None] = lambda step: None

    def serve_rewards(self) -> None:
        """Make the reward of the run config reachable, unless the config names a file of OpenRLHF's kind."""
        if self.config.reward_file is not None:
            return
        if self.config.ray.address is not None:
            raise ConfigError(
                "backend.ray.address: a cluster's nodes cannot ask for rewards here; name a Python file that they can "
                "read in backend.reward_file"
            )
        self.rewards = RewardServer(make_reward(self.run.training.reward), special_tokens(self.run.training.model))

    def states(self, start: int) -> Path:
        """Where a trainer that began at ``start`` keeps its own checkpoints."""
        return self.folder / f"ckpt-{start:06d}"

    def options(
        self,
        start: int,
        *,
        model: Path | None = None,
        steps: int | None = None,
        load: bool = False,
        watched: bool = True,
    ) -> list[str]:
        """OpenRLHF's options for a trainer that begins at ``start``; with ``steps`` it ends by itself after as many.

        What it saves is what will be read: with ``jump: merge``, each observed step of a run that is ``watched``.
        """
        run = self.run
        batch = run.training.prompts_per_step
        episodes, samples = run.steps, len(self.rows) // batch * batch
        if steps is not None:
            episodes, samples = 1, steps * batch
        reward = self.config.reward_file or (self.rewards.url if self.rewards is not None else "http://127.0.0.1:0/")
        places = Places(
            model=model or run.training.model,
            data=self.folder / PROMPTS,
            reward_url=str(reward),
            checkpoints=self.states(start),
            output=self.folder / "final",
        )
        merging = self.config.jump == "merge"
        segment = Segment(
            episodes=episodes,
            samples=samples,
            seed=run.seed + start,  # other samples, and in a new trainer another order of the prompts
            save_every=(run.schedule.every if watched else None) if merging else run.save_every,
            save_hf=merging or self.config.save_hf,
            save_deepspeed=not merging or self.config.masters,
            load=load,
            keep=10**6 if merging else 3,  # those of a merging run are removed here, once they are taken over
            chat=is_chat(self.rows),
        )
        options = make_command(run, self.config, places, segment)
        check_options(options)
        return options

    def write_prompts(self, start: int, steps: int | None = None) -> None:
        """The training prompts, those of step ``start`` first; with ``steps``, as many as these need."""
        batch = self.run.training.prompts_per_step
        count = len(self.rows) if steps is None else steps * batch
        rows = (self.rows[(start * batch + number) % len(self.rows)] for number in range(count))
        lines = (json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PROMPTS, "".join(lines))

    def start(
        self, options: Sequence[str], hooks: Sequence[str], control: dict[str, Any] | None, offset: int = 0
    ) -> Watch:
        """Start OpenRLHF with these options and hooks; ``offset`` is added to the steps that it logs."""
        scratch = Path(tempfile.mkdtemp(prefix="next-core-"))  # short: the paths of Ray's sockets have a limit
        try:
            return Watch(self, self._start(scratch, options, hooks, control), offset)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _start(
        self, scratch: Path, options: Sequence[str], hooks: Sequence[str], control: dict[str, Any] | None
    ) -> TrainerProcess:
        workers = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        settings = {
            "ray": _ray(self.config, scratch),
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
        env = environment(self.config.python, self.config.env)
        return TrainerProcess.start(command, env, self.folder / LOG, scratch)

    def logged(self, step: int, metrics: dict[str, float], check: bool = False) -> None:
        """What a trainer said of one step. Raises ``BackendError`` where its engines sample from other weights and
        this is to be ``check``-ed.
        """
        self.history.log(step, {key: value for key, value in metrics.items() if math.isfinite(value)})
        self.step_ended(step)
        bound, found = self.config.max_vllm_kl, metrics.get("vllm_kl")
        if check and bound is not None and found is not None and not abs(found) <= bound:
            raise BackendError(
                f"step {step}: the engines' probabilities are off from the actor's by vllm_kl {found:.2g}, bound "
                f"{bound:g}: they sample from other weights. If that is their precision, raise backend.max_vllm_kl"
            )

    def close(self) -> None:
        """Answer no more."""
        if self.rewards is not None:
            self.rewards.close()
            self.rewards = None


class Watch:
    """A trainer's process, whose rewards are served while one waits, and whose log is read on demand."""

    def __init__(self, setting: TrainerSetup, process: TrainerProcess, offset: int) -> None:
        self.process = process
        self._setting, self._offset = setting, offset
        self._log = LogReader(setting.folder / LOG)
        self._log.skip()

    def look(self) -> None:
        """Serve rewards for a moment."""
        if self._setting.rewards is not None:
            self._setting.rewards.serve(TICK)
        else:
            time.sleep(TICK)

    def read(self) -> None:
        """Pass on the steps that were logged."""
        for record in self._log.read():
            self._setting.logged(self._offset + record.number, record.metrics)

    def end(self, deadline: float | None = None) -> None:
        """Until it has ended by itself. Raises ``BackendError`` with its last lines if it failed, or takes too long."""
        while self.process.running:
            self.look()
            if deadline is not None and time.monotonic() > deadline:
                raise BackendError(f"the trainer does not end; its log: {self.process.log}")
        self.process.check()


def _ray(config: OpenRlhfConfig, scratch: Path) -> dict[str, Any]:
    """The arguments of ``ray.init``: a cluster that runs, or a Ray of the trainer's own."""
    ray = config.ray
    if ray.address is not None:
        return {"address": ray.address}
    local: dict[str, Any] = {"address": "local", "include_dashboard": False, "_temp_dir": str(scratch)}
    if ray.num_gpus is not None:
        local["num_gpus"] = ray.num_gpus
    if ray.num_cpus is not None:
        local["num_cpus"] = ray.num_cpus
    if ray.object_store_mib is not None:
        local["object_store_memory"] = ray.object_store_mib * 2**20
    return local
