"""Stands in for a trainer's Python: trains nothing, but saves, pauses and answers as OpenRLHF or verl with our hooks.

Started as that Python is: SCRIPT SETTINGS.json OPTION... for ``launch.py``, SCRIPT VERSION OPTION... for ``parse.py``
and ``composed.py``. verl's overrides are given the names of OpenRLHF's options.
The file PRETEND_RECORD gets a line for each start and request; PRETEND, JSON, says what goes wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

# Its end of the connection is the real one.
sys.path.insert(0, str(Path(sys.argv[1]).parents[2] / "external" / "trainer_side"))
from control_client import ControlClient

PLAN: dict[str, Any] = json.loads(os.environ.get("PRETEND", "{}"))
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
OPTIMIZER = "zero_optim_states.pt"


def note(**facts: Any) -> None:
    with Path(os.environ["PRETEND_RECORD"]).open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")


class Trainer:
    """Step n adds 0.01 / n to every weight."""

    def __init__(self, options: dict[str, str]) -> None:
        self.options, self.lora, self.step = options, "--ds.lora.rank" in options, 0
        self.states = Path(options["--ckpt.path"])
        self.every = int(options["--ckpt.save_steps"])
        self.steps: Steps | None = None
        self.weights = load_file(Path(options["--actor.model_name_or_path"]) / "model.safetensors")
        if self.lora:
            names = [name.removesuffix(".weight") for name in self.weights]
            shapes = {"A": np.ones((2, 4), "f4"), "B": np.zeros((3, 2), "f4")}
            self.weights = {f"base_model.model.{n}.lora_{s}.weight": shapes[s] for n in names for s in "AB"}
        if "--ckpt.load_enable" in options:
            self.load_state()

    def load_state(self) -> None:
        tag = (self.states / "_actor" / "latest").read_text()
        with zipfile.ZipFile(self.states / "_actor" / tag / OPTIMIZER) as file:
            self.weights = load(file.read("weights"))
        self.step = PLAN.get("takes_up", int(tag.removeprefix("global_step")))

    def train(self) -> None:
        self.step += 1
        rate = 0.01 / self.step * (1 if self.steps is None else self.steps.multiple)
        self.weights = {name: value + np.float32(rate) for name, value in self.weights.items()}
        if PLAN.get("dies_in_step") == self.step:
            sys.exit("out of luck")

    def keep(self) -> None:
        if self.every < 1 or self.step % self.every:
            return
        tag = f"global_step{self.step}"
        state = self.states / "_actor" / tag
        state.mkdir(parents=True)
        for name in ("mp_rank_00_model_states.pt", OPTIMIZER):
            with zipfile.ZipFile(state / name, "w") as file:
                file.writestr("weights", save(self.weights))
        if self.steps is not None:
            (state / "steps").write_text(str(self.steps.multiple))
        (self.states / "_actor" / "latest").write_text(tag)
        if "--ckpt.save_hf" in self.options:
            self.export(self.states / f"{tag}_hf")

    def save(self, folder: Path) -> None:
        if self.lora:
            (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
        name = "adapter_model" if self.lora else "model"
        save_file(self.weights, folder / f"{name}.safetensors", metadata={"format": "pt"})

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)
        shutil.copyfile(
            Path(self.options["--actor.model_name_or_path"]) / "tokenizer_config.json", folder / "tokenizer_config.json"
        )


class VerlTrainer(Trainer):
    """The same, with verl's checkpoints."""

    def load_state(self) -> None:
        folder = Path(self.options["trainer.resume_from_path"])
        self.weights = load_file(folder / "actor.safetensors")
        self.step = int(folder.name.removeprefix("global_step_"))

    def keep(self) -> None:
        if self.step % self.every:
            return
        folder = self.states / f"global_step_{self.step}"
        folder.mkdir(parents=True)
        if self.steps is not None:
            state = folder / "actor" / "next-core"
            state.mkdir(parents=True)
            (state / "steps").write_text(str(self.steps.multiple))
        save_file(self.weights, folder / "actor.safetensors")
        if PLAN.get("dies_in_save") != self.step:
            (folder / "data.pt").touch()

    def export(self, folder: Path) -> None:
        """verl has saved the last step."""


class Steps:
    """What ``Policy.on_steps`` is asked of."""

    def __init__(self, trainer: Trainer, multiple: float) -> None:
        self.trainer, self.multiple, self.seen, self.kept = trainer, multiple, [trainer.weights], {}

    def after_step(self) -> None:
        self.seen.append(self.trainer.weights)

    def set_multiple(self, multiple: float) -> None:
        self.multiple = multiple

    def end_block(self) -> None:
        pass

    def products(self) -> list[list[float]]:
        return [[1.0, 0.5], [0.5, 1.0]]

    def keep(self, step: int) -> None:
        self.kept[step] = self.trainer.weights

    def undo(self, step: int) -> None:
        self.trainer.weights = self.kept[step]

    def apply_mean(self, window: int) -> None:
        self.before = self.trainer.weights
        self.trainer.weights = {
            name: sum(one[name] for one in self.seen) / np.float32(len(self.seen)) for name in self.before
        }

    def replace_back(self) -> None:
        self.trainer.weights = self.before


class Controlled(ControlClient):
    """What ``trainer_side/controller.py`` can be asked."""

    def __init__(self, trainer: Trainer, control: dict[str, Any]) -> None:
        super().__init__(control["address"])
        self.trainer, self.ended = trainer, False
        trainer.step = max(trainer.step, control.get("start", 0))
        self._receive, self._connection.recv_bytes = self._connection.recv_bytes, self.noted

    def noted(self) -> bytes:
        data: bytes = self._receive()
        request = json.loads(data)
        note(step=self.trainer.step, **request)
        if PLAN.get("dies_in") == request["do"]:
            sys.exit("out of memory, as it were")
        return data

    def run(self) -> None:
        self.pause(self.trainer.step)
        while not self.ended:
            self.trainer.train()
            kl = PLAN.get("kl", {}).get(str(self.trainer.step), 0.001)
            reward = {"reward_mean": self.trainer.step / 100, "reward_std": 0.5, "num_samples": 4.0}
            found = {f"rollout/{name}": value for name, value in reward.items()}
            self.report(self.trainer.step, {"reward": self.trainer.step / 100, "vllm_kl": kl, **found})
            if self.trainer.step >= self.until:
                self.pause(self.trainer.step + PLAN.get("miscounts", 0))
            self.trainer.keep()
        self.trainer.export(Path(self.trainer.options.get("--ckpt.output_dir", ".")))

    def end_run(self) -> None:
        self.ended = True

    def save(self, folder: str) -> None:
        self.trainer.save(Path(folder))

    def answer(self, what: str, request: dict[str, Any]) -> Any:
        return getattr(self, what)(**request)

    def keep(self, folder: str) -> None:
        if "keep" in PLAN.get("cannot", []):
            raise ValueError("no such thing")
        save_file(self.trainer.weights, Path(folder) / "before.safetensors")

    def restore(self, folder: str, adapters: list[str]) -> None:
        self.trainer.weights = load_file(Path(folder) / "before.safetensors")

    def follow_steps(self, windows: list[int], kept: str, at: int, folder: str | None) -> str | None:
        multiple = 1.0 if folder is None else float((Path(folder) / "steps").read_text())
        self.trainer.steps = Steps(self.trainer, multiple)
        self.trainer.steps.keep(self.trainer.step)
        return PLAN.get("lost")

    def on_steps(self, method: str, arguments: list[Any]) -> dict[str, Any]:
        steps = self.trainer.steps
        value = getattr(steps, method)(*arguments)
        return {"value": value, "multiple": steps.multiple, "learning_rate": 0.01, "kept": list(steps.kept)}

    move = on_steps

    def load(self, folder: str | None, shifts: list[str], **_: Any) -> None:
        if folder is not None:
            new = self.trainer.weights = load_file(next(Path(folder).glob("*.safetensors")))
            for path in shifts:
                for name, shift in load_file(path).items():
                    module, _, side = name.rpartition(".weight.")
                    key = f"base_model.model.{module}.{side}.weight" if self.trainer.lora else name
                    new[key] = new[key] + shift

    def likelihood(self, pairs: list[Any]) -> float:
        return 1 / len(pairs)

    def validate(self) -> dict[str, float]:
        return {"validation": 0.25, "test": 0.5}

    def greedy(self, pairs: list[Any]) -> float:
        rewards = []
        for prompt, answer in pairs:
            asked = {"query": [f"{prompt}7<eos>"], "prompts": [prompt], "labels": [answer]}
            request = urllib.request.Request(self.trainer.options["--reward.remote_url"], json.dumps(asked).encode())
            with urllib.request.urlopen(request, timeout=30) as answered:
                rewards.append(json.load(answered)["rewards"])
        return float(sum(rewards) / len(rewards))


def read_options(words: list[str]) -> dict[str, str]:
    """The first value of each option."""
    followed = zip(words, [*words[1:], "--"], strict=True)
    return {word: "" if after.startswith("--") else after for word, after in followed if word.startswith("--")}


def read_overrides(words: list[str]) -> dict[str, str]:
    """verl's overrides, and the same by the names of OpenRLHF's options."""
    found = {key.lstrip("+"): value.strip('"') for key, _, value in (word.partition("=") for word in words)}
    names = {
        "--ckpt.path": "trainer.default_local_dir",
        "--ckpt.save_steps": "trainer.save_freq",
        "--actor.model_name_or_path": "actor_rollout_ref.model.path",
        "--train.seed": "data.seed",
    }
    options = found | {option: found[name] for option, name in names.items()}
    if found["actor_rollout_ref.model.lora_rank"] != "0":
        options["--ds.lora.rank"] = found["actor_rollout_ref.model.lora_rank"]
    if found["trainer.resume_mode"] == "resume_path":
        options["--ckpt.load_enable"] = ""
    return options


def main() -> None:
    script, first, *words = sys.argv[1:]
    verl = "verl" in Path(script).parts
    options = read_overrides(words) if verl else read_options(words)
    if Path(script).name == "composed.py":
        print(f"next-core answer: {json.dumps({'steps': int(options['trainer.total_training_steps'])})}")
        return
    if Path(script).name == "parse.py":
        step = {name: int(options[f"--rollout.{name}"]) for name in ("batch_size", "n_samples_per_prompt")}
        train = {"batch_size": int(options["--train.batch_size"]), "max_epochs": PLAN.get("epochs", 1)}
        print(f"next-core answer: {json.dumps({'rollout': step, 'train': train})}")
        return
    settings = json.loads(Path(first).read_text())
    names = ("PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "NEXT_CORE_REWARD")
    seen = {name: os.environ.get(name) for name in names}
    note(do="start", options=options, seen=seen, **settings)
    if PLAN.get("does_not_start_at") == int(options["--train.seed"]):
        sys.exit("no such device")
    Controlled((VerlTrainer if verl else Trainer)(options), settings["control"]).run()


if __name__ == "__main__":
    main()
