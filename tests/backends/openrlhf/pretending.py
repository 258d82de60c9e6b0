"""Runs whose trainer is ``pretend_trainer.py``: real processes, sockets and files, and nothing of OpenRLHF."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from next_backends.history_folder import JumpAdapter
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.run_config import RunConfig
from next_core.sources.metrics import METRICS, read_log
from tests.backends.openrlhf.processes import begun_since, children

Way = TypeVar("Way")
SCRIPT = Path(__file__).with_name("pretend_trainer.py")
ADAPTER = JumpAdapter("jump-1", '{"r": 1, "lora_alpha": 1}', {"layer.lora_A.weight": torch.zeros(1, 3)})


class Pretence:
    """A setting, and what its trainers were asked."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "run"
        self._folder, self._record = folder, folder / "requests.jsonl"
        self._record.touch()
        self._settings: list[TrainerSetup] = []
        self._ways: list[Any] = []
        self._before = children()
        model = folder / "base"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 2048}')
        (model / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        save_file({"layer.weight": np.ones((3, 4), "f4")}, model / "model.safetensors", metadata={"format": "pt"})
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir()
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n')
        self.python.chmod(0o755)

    def setting(
        self, plan: dict[str, Any] | None = None, backend: dict[str, Any] | None = None, **run: Any
    ) -> TrainerSetup:
        """Of a run of six steps; ``plan`` is what goes wrong."""
        env = {"PRETEND": json.dumps(plan or {}), "PRETEND_RECORD": str(self._record)}
        config = OpenRlhfConfig.model_validate({"python": self.python, "env": env, **(backend or {})})
        training = {
            "model": self._folder / "base",
            "data": {split: self._folder / f"{split}.jsonl" for split in ("train", "validation")},
            "prompts_per_step": 2,
            "generations": 2,
            "max_new_tokens": 4,
            **run.pop("training", {}),
        }
        schedule = {"observe": 3, "every": 1, "horizon": 1}
        block = {"steps": 6, "save_every": 2, "predictor": "secant", "schedule": schedule} | run
        setting = TrainerSetup(RunConfig.model_validate({**block, "training": training}), config, self.out)
        self._settings.append(setting)
        return setting

    def asked(self, *what: str) -> list[dict[str, Any]]:
        """The requests of these kinds, or all."""
        found = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [request for request in found if not what or request["do"] in what]

    def observe(self, way: Any, step: int) -> dict[str, torch.Tensor]:
        """Have the weights of a step saved as the backend does; returns them."""
        folder = self._settings[-1].history.checkpoint(step)
        folder.mkdir(parents=True)
        way.save(step, folder)
        return load_file(next(folder.glob("*.safetensors")))

    def jump(self, way: Any, step: int, length: float = 1.0, adapter: bool = False, keep: bool = False) -> Path:
        """Write a jump and have the trainer go on from it, as the backend does."""
        history = self._settings[-1].history
        folder = history.next_jump()
        shift = {"layer.weight.lora_B": torch.full((3, 2), length / 6**0.5)} if length else {}
        more = way.before_jump if keep else None
        history.write_jump(folder, step, 1.0, shift=shift, adapter=ADAPTER if adapter else None, more=more)
        way.jump(step, folder, None, 1.0)
        return folder

    def metrics(self) -> list[dict[str, float]]:
        return read_log(self.out / METRICS)

    def begun(self, way: Way) -> Way:
        """The same, to be ended when the test is over."""
        self._ways.append(way)
        return way

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of the trainers is left, or the test has failed."""
        for end in (*self._ways, *self._settings):
            end.close()
        left = begun_since(self._before)
        for process in left:
            process.kill()
        assert left == []
