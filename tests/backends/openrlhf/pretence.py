"""Runs whose trainer is ``pretend_trainer.py``: real processes, sockets and files, and nothing of OpenRLHF."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from next_backends.history_folder import JumpAdapter
from next_backends.openrlhf.merge_mode import MergeMode
from next_backends.openrlhf.openrlhf_backend import MODES
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.swap_mode import SwapMode
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.run_config import RunConfig
from next_core.sources.metrics import METRICS, read_log
from tests.backends.openrlhf.processes import begun_since, children

SCRIPT = Path(__file__).with_name("pretend_trainer.py")
ADAPTER = JumpAdapter("jump-1", '{"r": 1, "lora_alpha": 1}', {"layer.lora_A.weight": torch.zeros(1, 3)})
Mode = SwapMode | MergeMode


class Pretence:
    """A run folder whose trainers are pretended, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.out, self.trainer, self.base = folder / "run", folder / "run" / "trainer", folder / "base"
        self._folder, self._record = folder, folder / "requests.jsonl"
        self._record.touch()
        self._open: list[Any] = []
        self._before = children()
        self.base.mkdir()
        (self.base / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 2048}')
        (self.base / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        save_file({"layer.weight": np.ones((3, 4), "f4")}, self.base / "model.safetensors", metadata={"format": "pt"})
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir()
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n')
        self.python.chmod(0o755)

    def setup(
        self, plan: dict[str, Any] | None = None, backend: dict[str, Any] | None = None, **run: Any
    ) -> TrainerSetup:
        """The setup of a run of six steps with a jump after the third; ``plan`` is what goes wrong."""
        env = {"PRETEND": json.dumps(plan or {}), "PRETEND_RECORD": str(self._record)}
        config = OpenRlhfConfig.model_validate({"python": self.python, "env": env, **(backend or {})})
        training = {
            "model": self.base,
            "data": {split: self._folder / f"{split}.jsonl" for split in ("train", "validation")},
            "prompts_per_step": 2,
            "generations": 2,
            "max_new_tokens": 4,
            **run.pop("training", {}),
        }
        schedule = {"observe": 3, "every": 1, "horizon": 1}
        block = {"steps": 6, "save_every": 2, "predictor": "secant", "schedule": schedule} | run
        self._open.append(TrainerSetup(RunConfig.model_validate({**block, "training": training}), config, self.out))
        self.history = self._open[-1].history
        return self._open[-1]  # type: ignore[no-any-return]

    def mode(self, plan: dict[str, Any] | None = None, jump: str = "swap", **changes: Any) -> Any:
        """What drives the trainers with this ``backend.jump``."""
        if jump == "merge":
            changes = {"training": {"lora": None}, "save_every": None} | changes
        setup = self.setup(plan, backend={"jump": jump, **changes.pop("backend", {})}, **changes)
        return self.drive(setup)

    def drive(self, setup: TrainerSetup) -> Any:
        """The same for a setup; it is closed when the test is over."""
        self._open.insert(0, MODES[setup.config.jump](setup))
        return self._open[0]

    def started(self, plan: dict[str, Any] | None = None, jump: str = "swap", **changes: Any) -> Any:
        mode = self.mode(plan, jump, **changes)
        mode.start()
        return mode

    def kill_trainer(self) -> None:
        os.kill(self.asked()[-1]["pid"], signal.SIGKILL)

    def asked(self, *what: str) -> list[dict[str, Any]]:
        """The requests of these kinds, or all."""
        found = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [request for request in found if not what or request["do"] in what]

    def prompts(self) -> list[str]:
        """What the newest trainer trains on."""
        return [json.loads(line)["prompt"] for line in (self.trainer / "prompts.jsonl").read_text().splitlines()]

    def observe(self, mode: Mode, step: int) -> dict[str, torch.Tensor]:
        """Save the weights of a step as the backend does; return them."""
        folder = self.history.checkpoint(step)
        folder.mkdir(parents=True)
        mode.save(step, folder)
        return load_file(next(folder.glob("*.safetensors")))

    def jump(self, mode: Mode, step: int, length: float = 1.0, adapter: bool = False, keep: bool = False) -> Path:
        """Write a jump and let the trainer continue from it, as the backend does."""
        folder = self.history.next_jump()
        shift = {"layer.weight.lora_B": torch.full((3, 2), length / 6**0.5)} if length else {}
        more = mode.save_for_rollback if keep else None
        self.history.write_jump(folder, step, 1.0, shift=shift, adapter=ADAPTER if adapter else None, more=more)
        mode.jump(step, None, 1.0)  # type: ignore[arg-type] - merge alone reads the prediction
        return folder

    def metrics(self) -> list[dict[str, float]]:
        return read_log(self.out / METRICS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of the trainers is left, or the test has failed."""
        for end in self._open:
            end.close()
        left = begun_since(self._before)
        for process in left:
            process.kill()
        assert left == []
