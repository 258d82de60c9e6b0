"""The training loop under control: it pauses after the steps it is told, and does what it is asked while it pauses.

Runs in the actor of ``PPOTrainer``, which connects to next-core. Requests and answers are JSON objects.
"""

from __future__ import annotations

import json
import math
import socket
from typing import Any

import ray
import torch
from likelihood import right_answers
from policy import load, save, save_moments


def take_over(trainer_class: Any, settings: dict[str, Any]) -> None:
    """Let ``Control`` act before the first step and after each one, and count the steps as next-core does."""
    restore, finish_step = trainer_class.init_checkpoint_states, trainer_class.save_logs_and_checkpoints

    def init_checkpoint_states(self: Any) -> dict[str, Any]:
        states: dict[str, Any] = restore(self)
        states["global_step"] = max(states["global_step"], settings["start"])
        torch.manual_seed(settings["seed"])  # of the order of the prompts, which OpenRLHF leaves to chance
        self.next_core = Control(self, settings)
        self.next_core.pause(states["global_step"])
        return states

    def save_logs_and_checkpoints(self: Any, global_step: int, logs: Any = None, states: Any = None) -> None:
        self.next_core.report(global_step, logs or {})
        if global_step >= self.next_core.until:  # before it saves: what it saves then holds what was loaded
            self.next_core.pause(global_step)
        finish_step(self, global_step, logs, states)

    trainer_class.init_checkpoint_states = init_checkpoint_states
    trainer_class.save_logs_and_checkpoints = save_logs_and_checkpoints
    trainer_class.get_max_steps = lambda self: settings["scheduler_steps"]


class Control:
    """Answers the requests of next-core; ``until`` is the step after which the run pauses again."""

    def __init__(self, trainer: Any, settings: dict[str, Any]) -> None:
        self.trainer = trainer
        self.until = 0
        self._connection = socket.create_connection(tuple(settings["address"]))
        self._requests = self._connection.makefile("r", encoding="utf-8")
        self._send({"key": settings["key"]})

    def pause(self, step: int) -> None:
        """Say so, and do what is asked until training is to go on, or to end."""
        self._send({"paused": step})
        while True:
            line = self._requests.readline()
            if not line:
                raise ConnectionError("next-core has hung up: the run ends")
            request = json.loads(line)
            what, number = request.pop("do"), request.pop("number", None)
            if what == "train":
                self.until = request["until"]
                return
            if what == "stop":
                # The loop ends where no roll-outs come; the model is then saved as at any end.
                self.trainer.samples_generator.generate_samples = lambda **_: ([], None, 0, True)
                return
            try:
                answer = {"value": getattr(self, what)(**request)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            self._send(answer | {"number": number})

    def report(self, step: int, logs: dict[str, Any]) -> None:
        """The numbers of a step that ended."""
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        self._send({"step": step, "metrics": {key: value for key, value in numbers.items() if math.isfinite(value)}})

    def save(self, folder: str) -> None:
        """The trained weights as they are, in fp32 where the optimizer keeps masters."""
        self._on_policy(save, folder)

    def save_moments(self, file: str) -> None:
        """The optimizer's moments of what trains."""
        self._on_policy(save_moments, file)

    def load(
        self,
        folder: str | None,
        shifts: list[str],
        beside: list[str],
        moments: str | None = None,
        schedule: int | None = None,
    ) -> float:
        """Trained weights = those of ``folder`` + ``shifts``; the adapters ``beside`` act on top, frozen."""
        moved: float = self._on_policy(load, folder, shifts, beside, moments, schedule)
        self.trainer.broadcast_to_vllm()
        return moved

    def likelihood(self, pairs: list[list[str]]) -> float:
        """Mean probability of sampling exactly the answer and the end token."""
        found: float = self._on_policy(right_answers, pairs)
        return found

    def greedy(self, pairs: list[list[Any]]) -> float:
        """Mean reward of greedy completions."""
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

    def _on_policy(self, function: Any, *args: Any) -> Any:
        """A function of the policy's actor on every rank, for ranks gather weights together; the first one's result."""
        group = self.trainer.actor_model_group
        sleeps = self.trainer.args.ds.enable_sleep
        if sleeps:
            ray.get(group.async_run_method("reload_states"))
        found = ray.get([actor.__ray_call__.remote(function, *args) for actor in group._actor_handlers])
        if sleeps:
            ray.get(group.async_run_method("offload_states"))
        return found[0]

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")
