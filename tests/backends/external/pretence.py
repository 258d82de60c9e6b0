"""Runs whose trainer is ``pretend_trainer.py``: real processes, sockets and files, and nothing of a trainer's."""

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

from next_backends.external.external_backend import ExternalBackend
from next_backends.history_folder import HistoryFolder
from next_backends.openrlhf.openrlhf_backend import OpenRlhfBackend
from next_core.cycle.journal import JOURNAL, Journal
from next_core.interfaces import Applied, CoefficientUpdate, Prediction
from next_core.run_config import RunConfig
from next_core.sources.metrics import METRICS, read_log
from tests.backends.external.processes import begun_since, children

SCRIPT = Path(__file__).with_name("pretend_trainer.py")
LAYERS = ("first", "second", "third")


def motion(begin: int, end: int) -> float:
    """How far the simulated trainer moves every weight between two steps."""
    return sum(0.01 / step for step in range(begin + 1, end + 1))


class Pretence:
    """A run folder whose trainers are simulated, and what they were asked."""

    def __init__(self, folder: Path, backend: type[ExternalBackend] = OpenRlhfBackend) -> None:
        self._backend = backend
        self.out, self.trainer, self.base = folder / "run", folder / "run" / "trainer", folder / "base"
        self.folder, self._record = folder, folder / "requests.jsonl"
        self._record.touch()
        self._open: list[ExternalBackend] = []
        self._before = children()
        self.base.mkdir()
        (self.base / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 2048}')
        (self.base / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        weights = {f"{layer}.weight": np.ones((3, 4), "f4") for layer in LAYERS}
        save_file(weights, self.base / "model.safetensors", metadata={"format": "pt"})
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir()
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n')
        self.python.chmod(0o755)

    def config(self, plan: dict[str, Any] | None = None, **block: Any) -> Any:
        """The backend's block; ``plan`` is what goes wrong."""
        env = {"PRETEND": json.dumps(plan or {}), "PRETEND_RECORD": str(self._record)}
        # A process that serves rewards takes seconds to start: most trainers do without one.
        unserved = {"reward_file": self.folder / "reward.py"} if self._backend is OpenRlhfBackend else {}
        return self._backend.config_class.model_validate({"python": self.python, "env": env, **unserved, **block})

    def run(self, **changes: Any) -> RunConfig:
        """A run of six steps with a jump after the third."""
        training = {
            "model": self.base,
            "data": {split: self.folder / f"{split}.jsonl" for split in ("train", "validation")},
            "prompts_per_step": 2,
            "generations": 2,
            "max_new_tokens": 4,
            **changes.pop("training", {}),
        }
        schedule = {"observe": 3, "every": 1, "horizon": 1}
        block = {"steps": 6, "save_every": 2, "predictor": "secant", "schedule": schedule} | changes
        return RunConfig.model_validate({**block, "training": training})

    def prepared(
        self, plan: dict[str, Any] | None = None, backend: dict[str, Any] | None = None, step: int = 0, **run: Any
    ) -> ExternalBackend:
        """A backend that begins, or with ``step`` resumes at this step; it is closed when the test is over."""
        made = self._backend(self.config(plan, **(backend or {})))
        self._open.insert(0, made)
        assert made.prepare(self.run(**run), self.out, resume=step > 0) == step
        return made

    def started(self, plan: dict[str, Any] | None = None, **changes: Any) -> ExternalBackend:
        backend = self.prepared(plan, **changes)
        backend.start()
        return backend

    def resumed(self, killed: ExternalBackend, step: int, **changes: Any) -> ExternalBackend:
        """Kill the trainer of a backend, and resume its run at ``step``."""
        self.kill_trainer()
        killed.close()
        return self.started(step=step, **changes)

    def observe(self, backend: ExternalBackend, step: int) -> dict[str, torch.Tensor]:
        """Train up to a step and return its weights."""
        backend.train(step, lambda _: None)
        backend.observe(step)
        return load_file(next(HistoryFolder(self.out).checkpoint(step).glob("*.safetensors")))

    def jump(self, backend: ExternalBackend, step: int, keep: bool = False, space: Any = "factors") -> Applied:
        """Jump, after a step, by all that the first layer has moved so far, and write it into the journal."""
        updates = {f"{LAYERS[0]}.weight": CoefficientUpdate({step: 1.0, 0: -1.0}, space)}
        made = backend.apply_jump(Prediction(backend.source(), step, 1, updates=updates), 1.0, keep)
        journal = Journal(self.out / JOURNAL)
        journal.append("jump", step)
        journal.append("verify", step, jump_step=step, accepted=True, reason="", accuracy=None)
        return made

    def kill_trainer(self) -> None:
        os.kill(self.asked()[-1]["pid"], signal.SIGKILL)

    def asked(self, *what: str) -> list[dict[str, Any]]:
        """The requests of these kinds, or all."""
        found = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [request for request in found if not what or request["do"] in what]

    def prompts(self) -> list[str]:
        """What the newest trainer trains on."""
        return [json.loads(line)["prompt"] for line in (self.trainer / "prompts.jsonl").read_text().splitlines()]

    def steps_logged(self) -> list[float]:
        return [record["step"] for record in read_log(self.out / METRICS)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of the trainers is left, or the test has failed."""
        for backend in self._open:
            backend.close()
        left = begun_since(self._before)
        for process in left:
            process.kill()
        assert left == []
