"""Stands in for OpenRLHF's Python: trains nothing, but saves, pauses and answers as OpenRLHF with our hooks does.

Started as that Python is: SCRIPT SETTINGS.json OPTION... for ``launch.py``, SCRIPT STATE FILE for ``masters.py``.
The file PRETEND_RECORD gets a line for each start and request; PRETEND, JSON, says what goes wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

sys.path.insert(0, str(Path(sys.argv[1]).parent))  # trainer_side: its end of the connection is the real one
from control_client import ControlClient

PLAN: dict[str, Any] = json.loads(os.environ.get("PRETEND", "{}"))
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
OPTIMIZER = "zero_optim_states.pt"
KEY = "base_model.model.layer.lora_{}.weight"


def note(**facts: Any) -> None:
    with Path(os.environ["PRETEND_RECORD"]).open("a") as file:
        file.write(json.dumps(facts) + "\n")


def masters(state: Path) -> bytes:
    with zipfile.ZipFile(state / OPTIMIZER) as file:
        return file.read("weights")


class Trainer:
    """Each step adds a hundredth to every weight."""

    def __init__(self, options: dict[str, str], lora: bool) -> None:
        self.options, self.lora, self.step = options, lora, 0
        self.states = Path(options["--ckpt.path"])
        every = int(options["--ckpt.save_steps"])
        self.saves = {step for step in range(1, 1000) if every > 0 and step % every == 0}
        if lora:
            self.weights = {KEY.format("A"): np.ones((2, 4), "f4"), KEY.format("B"): np.zeros((3, 2), "f4")}
        else:
            self.weights = load_file(Path(options["--actor.model_name_or_path"]) / "model.safetensors")
        if "--ckpt.load_enable" in options:
            tag = (self.states / "_actor" / "latest").read_text()
            self.weights = load(masters(self.states / "_actor" / tag))
            self.step = PLAN.get("takes_up", int(tag.removeprefix("global_step")))

    def train(self) -> None:
        self.step += 1
        self.weights = {name: value + np.float32(0.01) for name, value in self.weights.items()}
        if PLAN.get("dies_in_step") == self.step:
            sys.exit("out of luck")
        print(f"Global step {self.step}: {self.metrics()}", flush=True)

    def metrics(self) -> dict[str, float]:
        return {"reward": self.step / 100, "vllm_kl": PLAN.get("kl", {}).get(str(self.step), 0.001)}

    def keep(self) -> None:
        if self.step not in self.saves:
            return
        tag = f"global_step{self.step}"
        if "--ckpt.disable_ds" not in self.options:
            state = self.states / "_actor" / tag
            state.mkdir(parents=True)
            for name in ("mp_rank_00_model_states.pt", OPTIMIZER):
                with zipfile.ZipFile(state / name, "w") as file:
                    file.writestr("weights", save(self.weights))
            (self.states / "_actor" / "latest").write_text(tag)
        if "--ckpt.save_hf" in self.options:
            self.export(self.states / f"{tag}_hf")

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(self.options["--actor.model_name_or_path"])
        if self.lora:
            (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
            save_file(self.weights, folder / "adapter_model.safetensors")
        else:
            shutil.copyfile(source / "config.json", folder / "config.json")
            save_file(self.weights, folder / "model.safetensors")
        time.sleep(PLAN.get("slow", 0))
        shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")


class Controlled(ControlClient):  # type: ignore[misc]
    """What ``trainer_side/controller.py`` can be asked."""

    def __init__(self, trainer: Trainer, control: dict[str, Any]) -> None:
        super().__init__(control)
        self.trainer, self.ended = trainer, False
        trainer.step = max(trainer.step, control["start"])
        self._receive, self._connection.recv_bytes = self._connection.recv_bytes, self.noted

    def noted(self) -> bytes:
        data: bytes = self._receive()
        request = json.loads(data)
        note(pid=os.getpid(), step=self.trainer.step, **request)
        if PLAN.get("dies_in") == request["do"]:
            sys.exit("out of memory, as it were")
        return data

    def run(self) -> None:
        self.pause(self.trainer.step)
        while not self.ended:
            self.trainer.train()
            self.report(self.trainer.step, self.trainer.metrics())
            if self.trainer.step >= self.until:
                self.pause(self.trainer.step + PLAN.get("miscounts", 0))
            self.trainer.keep()
        self.trainer.export(Path(self.trainer.options["--ckpt.output_dir"]))

    def end_run(self) -> None:
        self.ended = True

    def save(self, folder: str) -> None:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(CONFIG))
        save_file(self.trainer.weights, Path(folder) / "adapter_model.safetensors")

    def save_moments(self, file: str) -> None:
        if "save_moments" in PLAN.get("cannot", []):
            raise ValueError("no such thing")
        save_file({"exp_avg/x": np.ones(1, "f4")}, file)

    def load(self, folder: str | None, shifts: list[str], **_: Any) -> None:
        if folder is not None:
            new = self.trainer.weights = load_file(Path(folder) / "adapter_model.safetensors")
            for path in shifts:
                for name, shift in load_file(path).items():
                    new[KEY.format(name[-1])] = new[KEY.format(name[-1])] + shift

    def likelihood(self, pairs: list[Any]) -> float:
        return 1 / len(pairs)

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


def main() -> None:
    script, first, *words = sys.argv[1:]
    if Path(script).name == "masters.py":
        if PLAN.get("unreadable"):
            sys.exit("what is this?")
        Path(words[0]).write_bytes(masters(Path(first)))
        return
    settings = json.loads(Path(first).read_text())
    options = read_options(words)
    seen = {name: os.environ.get(name) for name in ("PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    note(pid=os.getpid(), do="start", options=options, seen=seen, **settings)
    if PLAN.get("does_not_start_at") == int(options["--train.seed"]):
        sys.exit("no such device")
    trainer = Trainer(options, "lora" in settings["hooks"])
    if settings["control"] is not None:
        Controlled(trainer, settings["control"]).run()
        return
    total = int(options["--train.num_episodes"]) * int(options["--data.max_samples"])
    for _ in range(total // int(options["--rollout.batch_size"])):
        trainer.train()
        trainer.keep()
    trainer.export(Path(options["--ckpt.output_dir"]))


if __name__ == "__main__":
    main()
