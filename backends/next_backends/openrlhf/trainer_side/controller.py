"""OpenRLHF's training loop under control of next-core. Runs in the Ray actor of ``PPOTrainer``."""

from __future__ import annotations

from typing import Any

import ray
import torch
from control_client import MOVES, ControlClient
from zero_policy import on_policy


def take_over(trainer_class: Any, settings: dict[str, Any]) -> None:
    """Let ``Controller`` act before the first step and after each one, and count the steps as next-core does."""
    restore, finish_step = trainer_class.init_checkpoint_states, trainer_class.save_logs_and_checkpoints

    def init_checkpoint_states(self: Any) -> dict[str, Any]:
        states: dict[str, Any] = restore(self)
        states["global_step"] = max(states["global_step"], settings["start"])
        torch.manual_seed(settings["seed"])  # for the order of the prompts, which OpenRLHF does not seed
        self.next_core = Controller(self, settings["address"])
        self.next_core.pause(states["global_step"])
        return states

    def save_logs_and_checkpoints(self: Any, global_step: int, logs: Any = None, states: Any = None) -> None:
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        self.next_core.report(global_step, numbers)
        if global_step >= self.next_core.until:  # before OpenRLHF saves, so that the state contains the jump
            self.next_core.pause(global_step)
        finish_step(self, global_step, logs, states)

    trainer_class.init_checkpoint_states = init_checkpoint_states
    trainer_class.save_logs_and_checkpoints = save_logs_and_checkpoints
    trainer_class.get_max_steps = lambda self: settings["scheduler_steps"]


class Controller(ControlClient):  # type: ignore[misc]
    """What next-core can ask of a paused ``PPOTrainer``: ``greedy``, and the methods of ``Policy``."""

    def __init__(self, trainer: Any, address: str) -> None:
        self.trainer = trainer
        super().__init__(address)

    def end_run(self) -> None:
        # The loop ends when there are no rollouts; the model is then saved as at any end.
        self.trainer.samples_generator.generate_samples = lambda **_: ([], None, 0, True)

    def answer(self, what: str, request: dict[str, Any]) -> Any:
        if what == "greedy":
            return self.greedy(**request)
        found = self._on_policy(what, *request.values())  # in the order of the method's parameters
        if what in MOVES:
            self.trainer.broadcast_to_vllm()
        return found

    def greedy(self, pairs: list[list[Any]]) -> float:
        """Return the mean reward of greedy completions."""
        trainer, generator = self.trainer, self.trainer.samples_generator
        kept = generator.eval_dataloader
        chat = trainer.tokenizer.apply_chat_template
        texts = [p if isinstance(p, str) else chat(p, tokenize=False, add_generation_prompt=True) for p, _ in pairs]
        generator.eval_dataloader = [
            (["eval"], [text], [answer], [None]) for text, (_, answer) in zip(texts, pairs, strict=True)
        ]
        try:
            samples = generator.generate_eval_samples(
                **{**trainer.generate_kwargs, "temperature": 0.0, "top_p": 1.0, "n_samples_per_prompt": 1}
            )
        finally:
            generator.eval_dataloader = kept
        rewards = [float(sample.rewards.mean()) for sample in samples]
        return sum(rewards) / len(rewards)

    def _on_policy(self, method: str, *arguments: Any) -> Any:
        """Call a method of the policy on every rank, as weights are sharded; return its answer."""
        group = self.trainer.actor_model_group
        sleeps = self.trainer.args.ds.enable_sleep
        if sleeps:
            ray.get(group.async_run_method("reload_states"))
        found = ray.get([actor.__ray_call__.remote(on_policy, method, *arguments) for actor in group._actor_handlers])
        if sleeps:
            ray.get(group.async_run_method("offload_states"))
        return found[0]
