"""verl's FSDP2 engine and its checkpoint manager, under control of next-core, without Ray and rollouts.

Started by torchrun as verl's launch.py is: SETTINGS.json OVERRIDE... Each step trains on the right answers of some
prompts. TRUTH is a folder for what the processes hold, gathered by torch: ``N-before.safetensors`` after the optimizer
stepped, ``N-after.safetensors`` after the pause that may follow it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composed import compose_config
from fsdp_policy import on_policy
from pausing_trainer import Controller
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from verl.workers.engine_workers import ActorRolloutRefWorker

from next_core.errors import NextCoreError

ROWS = 8  # Rows of each rank in a step


class Trainer:
    """One rank of the actor."""

    def __init__(self, config: Any) -> None:
        self.config, self.rank, self.step = config, int(os.environ["RANK"]), 0
        torch.manual_seed(config.data.seed)
        self.actor = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
        self.actor.init_model()
        self.engine = self.actor.actor.engine
        self.worker = SimpleNamespace(worker_dict={"actor": self.actor})
        self.states = Path(config.trainer.default_local_dir)
        rows = [json.loads(line) for line in Path(config.data.train_files).read_text().splitlines()]
        self.texts = [row["prompt"][0]["content"] + row["reward_model"]["ground_truth"] for row in rows]
        if config.trainer.resume_mode == "resume_path":
            folder = Path(config.trainer.resume_from_path)
            self.step = int(folder.name.removeprefix("global_step_"))
            self.actor.load_checkpoint(str(folder / "actor"))
        self.tell("before")

    def train(self) -> float:
        self.step += 1
        first = (2 * self.step + self.rank) * ROWS % len(self.texts)
        tokenizer = self.engine.model_config.tokenizer
        rows = tokenizer(self.texts[first : first + ROWS], return_tensors="pt", padding=True)
        with self.engine.train_mode():
            self.engine.optimizer_zero_grad()
            labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
            loss = self.engine.module(**rows, labels=labels, use_cache=False).loss
            loss.backward()
            self.engine.optimizer_step()
            self.engine.lr_scheduler_step()
        self.tell("before")
        return float(loss)

    def end_step(self, follows: bool) -> None:
        """Save as verl does, after a pause."""
        self.tell("after")
        if self.step % self.config.trainer.save_freq:
            return
        folder = self.states / f"global_step_{self.step}"
        if follows:
            self.policy("save_steps", str(folder / "actor" / "next-core"))
        self.actor.save_checkpoint(str(folder / "actor"), global_step=self.step)
        if self.rank == 0:
            (folder / "data.pt").touch()

    def policy(self, method: str, *arguments: Any) -> Any:
        return on_policy(self.worker, method, *arguments)

    def tell(self, when: str) -> None:
        """Write what is in memory, gathered by torch."""
        model, whole = self.engine.module, StateDictOptions(full_state_dict=True)
        tensors = dict(get_model_state_dict(model, options=whole))
        for name, state in get_optimizer_state_dict(model, self.engine.optimizer, options=whole)["state"].items():
            tensors |= {f"adam.{name}.{key}": torch.as_tensor(value) for key, value in state.items()}
        with torch.no_grad():
            tensors["logits"] = model(input_ids=torch.arange(3, 11)[None], use_cache=False).logits
        if self.rank == 0:
            folder = Path(os.environ["TRUTH"])
            folder.mkdir(exist_ok=True)
            found = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
            save_file(found, folder / f"{self.step}-{when}.safetensors")


class Leader(Controller):  # type: ignore[misc]
    """Rank 0's connection; the other ranks do what it does."""

    ended = False

    def on_policy(self, method: str, *arguments: Any) -> Any:
        return self.all("policy", method, *arguments)

    def all(self, what: str, *arguments: Any) -> Any:
        distributed.broadcast_object_list([(what, arguments)], 0)
        return getattr(self.trainer, what)(*arguments)

    def end_run(self) -> None:
        self.ended = True


def lead(trainer: Trainer, address: str) -> None:
    control = Leader(trainer, address)
    control.pause(trainer.step)
    while not control.ended:
        control.report(trainer.step, {"loss": control.all("train")})
        if trainer.step >= control.until:
            control.pause(trainer.step)
        control.all("end_step", control.follows)
    distributed.broadcast_object_list([("end", ())], 0)


def follow(trainer: Trainer) -> None:
    while True:
        order: list[Any] = [None]
        distributed.broadcast_object_list(order, 0)
        what, arguments = order[0]
        if what == "end":
            return
        # What rank 0 raises is its answer, as under Ray; here the others must go on.
        with contextlib.suppress(NextCoreError):
            getattr(trainer, what)(*arguments)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    trainer = Trainer(compose_config(sys.argv[2:]))
    if trainer.rank == 0:
        lead(trainer, settings["control"]["address"])
    else:
        follow(trainer)


if __name__ == "__main__":
    main()
