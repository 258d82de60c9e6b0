"""One LoRA run for all appliers, and predictions from it."""

from pathlib import Path
from typing import Any

import pytest

from next_core import open_checkpoints
from next_core.interfaces import CoefficientUpdate, Prediction
from next_core.types import Space
from tests.conftest import LoraRun, MakeRun

ROW = "model.layers.0.self_attn.q_proj.weight"  # A matrix of (16, 16)
BOTH = pytest.mark.parametrize("applier", ["peft-adapter", "merged-model"])


@pytest.fixture(scope="package")
def run(make_lora_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    """A run of rank 3 with rank-stabilised scaling that nobody writes to."""
    return make_lora_run(tmp_path_factory.mktemp("run") / "checkpoints", (0, 10, 20), use_rslora=True, r=3)


def secant(run: LoraRun, backbone: Path | None = None, space: Space = "merged", **others: Any) -> Prediction:
    """All matrices move as from step 10 to step 20, except those in ``others``."""
    source = open_checkpoints(run.path, backbone=backbone or run.base)
    updates = {name: CoefficientUpdate({20: 1.0, 10: -1.0}, space) for name in run.deltas[20]}
    return Prediction(source, 20, 10, updates={**updates, **others.pop("updates", {})}, **others)
