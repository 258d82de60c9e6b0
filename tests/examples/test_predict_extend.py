"""The method in one file makes the jumps that the engine makes."""

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, GATE = 8, 2
SCHEDULE = {"every": 2, "observe": 4, "jump_every": 2, "settle": 2, "horizon": 2}
JUMPS = (4, 6)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example with a run of seconds: two jumps in eight steps."""
    pytest.importorskip("trl", reason="the example trains with TRL: install next-core[trl]")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("predict_extend")
    for name, value in {"steps": STEPS, "gate": GATE, **SCHEDULE}.items():
        monkeypatch.setattr(module, name.upper(), value)
    return module


def test_the_whole_method_fits_in_150_lines_without_this_package() -> None:
    text = (EXAMPLES / "predict_extend.py").read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert modules == {"json", "pathlib", "torch", "datasets", "peft", "transformers", "trl"}
    assert len(text.splitlines()) <= 150


@pytest.mark.trl
@pytest.mark.parametrize(("alpha", "max_ratio", "verdict"), [(4.0, 10.0, "jumped"), (3000.0, 1e9, "undone")])
def test_the_example_and_the_engine_have_the_same_weights_after_every_step(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    alpha: float,
    max_ratio: float,
    verdict: str,
) -> None:
    from next_backends.trl import PredictExtendCallback

    monkeypatch.setattr(example, "ALPHA", alpha)
    monkeypatch.setattr(example, "MAX_RATIO", max_ratio)
    trainer = example.make_trainer()
    own = example.PredictExtend(trainer)
    own_weights = train(trainer, own)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] in map(str, JUMPS)]

    trainer = example.make_trainer()
    engine = PredictExtendCallback(
        {"name": "secant", "window": SCHEDULE["horizon"], "gate": {"window": GATE}},
        alpha=alpha,
        guards={"max_norm_ratio": max_ratio},
        evaluate=lambda model: example.accuracy(trainer, "validation"),
        folder=tmp_path,
        **SCHEDULE,
    )
    engine_weights = train(trainer, engine)

    assert len(printed) == len(JUMPS)
    assert all(line.endswith(verdict) for line in printed), printed
    assert [jump["accepted"] for jump in engine.journal.jumps()] == [verdict == "jumped"] * len(JUMPS)
    torch.testing.assert_close(own_weights, engine_weights, rtol=0, atol=1e-6)
    check_triplets(example, own, tmp_path)


def train(trainer: Any, jumps: Any) -> dict[int, dict[str, Tensor]]:
    """Train with a callback that jumps; return the trained weights after each step, jump included."""
    from transformers import TrainerCallback

    seen: dict[int, dict[str, Tensor]] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameters = trainer.model.named_parameters()
            seen[state.global_step] = {name: p.detach().clone() for name, p in parameters if p.requires_grad}

    trainer.add_callback(jumps)
    trainer.add_callback(Watch())
    trainer.train()
    return seen


def check_triplets(example: ModuleType, own: Any, folder: Path) -> None:
    """The rank-1 part of each matrix's last motion is what the engine finds in its own checkpoints."""
    from next_core import History, open_checkpoints

    horizon = SCHEDULE["horizon"]
    found = History(open_checkpoints(folder / "checkpoints"), rank=1).components("target", horizon)
    motions = example.deltas(own.past[STEPS], own.past[STEPS - horizon])
    modules = own.trainer.model.named_modules()
    names = [f"{name.removeprefix('base_model.model.')}.weight" for name, layer in modules if hasattr(layer, "lora_A")]
    assert sorted(names) == sorted(found)
    for name, motion in zip(names, motions, strict=True):
        u, sigma, v = example.triplet(motion)
        wanted = found[name].lowrank().dense()[-1].double()
        torch.testing.assert_close(sigma * torch.outer(u, v), wanted, rtol=0, atol=1e-4 * float(sigma))
