"""verl's synchronous trainer under control of next-core. Runs in the Ray actor of the task runner."""

import statistics
from pathlib import Path
from typing import Any

import numpy
import ray
import transfer_queue
from control_client import MOVES, ControlClient
from fsdp_policy import on_policy
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync


class PausingTrainer(PPOTrainerSync):  # type: ignore[misc]
    """Pauses before the first step, and between a step's update and its checkpoint, which then contains a jump."""

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self.next_core = Controller(self, self.config.next_core.address)
        self.next_core.pause(self.global_steps - 1)
        if self.next_core.moved:  # later pauses are before verl's own synchronization
            self.checkpoint_manager.sleep_replicas()  # engines that sleep already ignore it
            self.checkpoint_manager.update_weights(self.global_steps - 1)
            self.next_core.moved = False

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> Any:
        batch = super().step(metrics, timing_raw)
        self.next_core.report(self.global_steps, _plain(metrics) | _rewards(batch))
        if self.global_steps >= self.next_core.until:
            self.next_core.pause(self.global_steps)
        return batch

    def _save_checkpoint(self) -> None:
        if self.next_core.follows:
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            # Of an old checkpoint verl removes the actor's folder only.
            self.next_core.on_policy("save_steps", str(folder / "actor" / "next-core"))
        super()._save_checkpoint()


class Controller(ControlClient):  # type: ignore[misc]
    """What next-core can ask of a paused trainer: ``validate``, and the methods of ``Policy``."""

    def __init__(self, trainer: Any, address: str) -> None:
        self.trainer = trainer
        self.moved = self.follows = False
        super().__init__(address)

    def end_run(self) -> None:
        self.trainer.total_training_steps = self.trainer.global_steps

    def answer(self, what: str, request: dict[str, Any]) -> Any:
        if what == "validate":
            return self.validate()
        self.follows = self.follows or what == "follow_steps"
        self.moved = self.moved or what in MOVES
        return self.on_policy(what, *request.values())  # in the order of the method's parameters

    def validate(self) -> dict[str, float]:
        """Return the mean reward of greedy completions of each split, as verl's own validation has it."""
        trainer = self.trainer
        trainer.checkpoint_manager.sleep_replicas()
        trainer.checkpoint_manager.update_weights(trainer.global_steps)
        found = trainer._validate()
        trainer.checkpoint_manager.sleep_replicas()
        self.moved = True  # before the first step verl expects engines that are awake
        return {
            split: float(value)
            for split in ("validation", "test")
            for key, value in found.items()
            if key.startswith(f"val-core/{split}/") and "/mean@" in key
        }

    def on_policy(self, method: str, *arguments: Any) -> Any:
        """Call a method of the policy on every rank, as weights are sharded; return rank 0's answer."""
        workers = self.trainer.actor_rollout_wg.workers
        return ray.get([worker.__ray_call__.remote(on_policy, method, *arguments) for worker in workers])[0]


def _rewards(batch: Any) -> dict[str, float]:
    """Return the mean reward of a step's rollouts, its standard deviation and their number."""
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
    scores = transfer_queue.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    rewards = [float(row.sum()) for row in scores["rm_scores"].unbind()]
    return {
        "rollout/reward_mean": statistics.fmean(rewards),
        "rollout/reward_std": statistics.pstdev(rewards),
        "rollout/num_samples": float(len(rewards)),
    }


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    numbers = {key: numpy.mean(value) for key, value in metrics.items() if isinstance(value, int | float | list)}
    return {key: float(value) for key, value in numbers.items()}
