"""What test_processes.py starts in two processes: short runs one after another, and what each process saw of them.

``two_processes.py OUT RUN...``, started twice as torch.distributed has it, writes ``OUT/RUN.rank0.pickle``
and ``OUT/RUN.rank1.pickle``.
"""

import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from next_backends.trl import PredictExtendCallback
from next_backends.trl.argument_checks import check_reachable
from next_backends.trl.drift import moving_tensors
from next_core.errors import BackendError
from tests.backends.trl.conftest import BASE, FACTORS, MERGED, SAVING, SMALL, Watch, build

RANK = int(os.environ.get("RANK", "0"))
TOKENIZER = AutoTokenizer.from_pretrained(BASE)


class Seen(TrainerCallback):
    """Copies what a process holds, before the jumps' callback and after it, at the end of each step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, states = kwargs["model"], kwargs["optimizer"].state
        moments = {
            f"{key}/{name}": states[parameter][key].numpy().copy()
            for name, parameter in model.named_parameters()
            for key in states.get(parameter, ())
        }
        weights = {name: tensor.detach().numpy().copy() for name, tensor in moving_tensors(model).items()}
        self.steps[state.global_step] = {
            "weights": weights,
            "moments": moments,
            "training": model.training,
            "random": random_states(),
        }


def random_states() -> list[Any]:
    """Of torch, Python and NumPy."""
    return [torch.get_rng_state().numpy(), random.getstate()[1], np.random.get_state()[1]]  # type: ignore[index]


class Probe:
    """Reads accuracies from a list, as carelessly as a user's probe may be."""

    def __init__(self, readings: Iterable[float]) -> None:
        self.readings, self.models = iter(readings), []

    def __call__(self, model: Any) -> float:
        assert RANK == 0
        model.eval()
        _ = torch.rand(3), random.random(), np.random.rand()
        self.models.append(type(model).__name__)
        return next(self.readings)


class Runs:
    """One method a run."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def go(
        self,
        callback: PredictExtendCallback | None,
        name: str,
        *,
        steps: int = 9,
        lora: bool = True,
        tied: bool = False,
        before: list[Any] | None = None,
        resume: int | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Train, and say what was seen."""
        ahead, after, out = Seen(), Seen(), self.out / name
        callbacks = [*(before or []), ahead, *([callback] if callback else []), after]
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, tie_word_embeddings=tied)
        fields = {"steps": steps, "model": model, "per_device_train_batch_size": 4} | fields
        trainer = build(TOKENIZER, out, callbacks, lora={"lora_dropout": 0.1} if lora else False, **fields)
        error = None
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(out / f"checkpoint-{resume}"))
        except Exception as raised:
            error = type(raised).__name__, getattr(raised, "kind", ""), getattr(raised, "message", str(raised))
        return {
            "error": error,
            "before": ahead.steps,
            "after": after.steps,
            "random": random_states(),
            "adapters": list(getattr(trainer.model.base_model, "active_adapters", [])) if lora else [],
            "journal": callback.journal.records if callback else [],
            "step": trainer.state.global_step,
            "time_limit": callback.cycle.guards.time_limit if callback and callback.cycle else None,
            "wrapped": type(trainer.model_wrapped).__name__,
        }

    def plain(self) -> Any:
        return self.go(None, "plain")

    def refused(self) -> Any:
        """Made in the model, probed, and taken back at once."""
        probe = Probe([0.9, 0.1])
        seen = self.go(PredictExtendCallback(MERGED, evaluate=probe, **SMALL), "refused")
        return seen | {"models": probe.models}

    def factors(self) -> Any:
        """Two jumps; the reducer is told that every parameter is used."""
        made = PredictExtendCallback(FACTORS, alpha=3.0, **SMALL | {"jump_every": 3, "settle": 0})
        return self.go(made, "factors", steps=10, ddp_find_unused_parameters=False)

    def merged(self) -> Any:
        """Two adapters beside the trained one, a reference policy, and two micro-batches a step."""
        made = PredictExtendCallback(MERGED, alpha=2.0, **SMALL | {"jump_every": 3})
        return self.go(
            made,
            "merged",
            steps=11,
            beta=0.05,
            ddp_find_unused_parameters=False,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )

    def full(self) -> Any:
        """Embeddings and head are one parameter."""
        made = PredictExtendCallback(MERGED, alpha=2.0, **SMALL)
        return self.go(made, "full", lora=False, tied=True, weight_decay=0.1)

    def whole(self) -> Any:
        return self._saved("whole")

    def resumed(self) -> Any:
        """From the middle of a recovery window; the reducer is told that every parameter is used."""
        return self._saved("whole", readings=[0.1], resume=8, ddp_find_unused_parameters=False)

    def zero_dies(self) -> Any:
        """Process 0, in the probe after the jump, while the other waits."""

        def readings() -> Iterable[float]:
            yield 0.5
            self._die("zero_dies")

        return self._saved("zero_dies", readings=readings())

    def _die(self, run: str) -> None:
        (self.out / f"{run}.at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    def survived(self) -> Any:
        return self._saved("zero_dies", resume=4)

    def _saved(self, name: str, readings: Iterable[float] = (0.5, 0.5, 0.1), **fields: Any) -> Any:
        """Saved at 4 and 8; a jump at 6 that is judged at 9, and rolled back there."""
        made = PredictExtendCallback(MERGED, evaluate=Probe(readings), guards={"recovery": 3}, **SMALL | {"settle": 3})
        return self.go(made, name, steps=12, **SAVING, **fields)

    def scaled(self) -> Any:
        """Steps that are far too large are undone after step 4; then smaller ones, and the mean at the end."""
        probe = Probe([0.1, 0.2, 0.3, 0.3])
        made = PredictExtendCallback({"name": "step-scale", "block": 2}, evaluate=probe, average=20)
        return self.go(made, "scaled", steps=11, learning_rate=0.01)

    def drifted(self) -> Any:
        def push(step: int, model: Any) -> None:
            if step == 5 and RANK == 1:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).view(-1)[3].add_(1e-6)

        return self.go(PredictExtendCallback(FACTORS, **SMALL), "drifted", before=[Watch(push)])

    def unwritable(self) -> Any:
        """What the trainer logs after the last step cannot be written by process 0: the others are not waiting then."""

        def block(step: int, model: Any) -> None:
            if step == 9 and RANK == 0:
                metrics = self.out / "unwritable" / "next-core" / "metrics.jsonl"
                metrics.unlink(missing_ok=True)
                metrics.mkdir()

        return self.go(PredictExtendCallback(FACTORS, **SMALL), "unwritable", before=[Watch(block)])

    def unfollowed(self) -> Any:
        """Process 1 has no room for the adapter."""
        made = PredictExtendCallback(MERGED, **SMALL)

        def refuse(step: int, model: Any) -> None:
            if step == 6 and RANK == 1:
                model.add_adapter = lambda *arguments: (_ for _ in ()).throw(MemoryError("no room"))

        return self.go(made, "unfollowed", before=[Watch(refuse)])

    def taken(self) -> Any:
        """A folder that holds another run."""
        return self.go(PredictExtendCallback("stay", **SMALL), "refused")

    def unlike(self) -> Any:
        return self.go(PredictExtendCallback("stay", **SMALL | {"settle": RANK}), "unlike")

    def sharded(self) -> Any:
        """A model of which a process holds a part, as tensor parallelism loads it."""
        layer = torch.nn.Linear(4, 4)
        mesh = init_device_mesh("cpu", (2,))
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        try:
            check_reachable(layer)
        except BackendError as error:
            return {"error": ("BackendError", error.kind, error.message)}
        return {"error": None}

    def alone_goes_on(self) -> Any:
        """What two processes began, in one."""
        return self._saved("whole", readings=[0.1], resume=8, per_device_train_batch_size=8)

    def slow(self) -> Any:
        """A probe that takes longer than the others wait. The last run: what follows would meet its remains."""

        def readings() -> Iterable[float]:
            time.sleep(12)
            yield 0.5
            yield 0.5

        made = PredictExtendCallback(FACTORS, evaluate=Probe(readings()), **SMALL)
        started = time.monotonic()
        return self.go(made, "slow", ddp_timeout=10) | {"seconds": time.monotonic() - started}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for run in sys.argv[2:]:
        seen = getattr(Runs(out), run)()
        with (out / f"{run}.rank{RANK}.pickle").open("wb") as file:
            pickle.dump(seen, file)
        if run == "slow":
            os._exit(0)
        if run.endswith("dies"):
            sys.exit(seen["error"])
