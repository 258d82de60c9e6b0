"""Runs of a config with another optimizer than TRL's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from next_core.config import make_config
from next_core.plugins import make_chosen
from tests.backends.trl.conftest import BASE, EXAMPLES
from tests.errors import raises_kind

pytestmark = pytest.mark.trl
FILES = {split: str(EXAMPLES / "arithmetic" / f"{split}.jsonl") for split in ("train", "test")}
TRAINING = {"model": str(BASE), "data": FILES, "max_new_tokens": 4, "prompts_per_step": 4, "generations": 4}


def prepared(out: Path, learning_rate: float, **optimizer: Any) -> Any:
    training = TRAINING | {"learning_rate": learning_rate}
    backend = {"name": "trl", "optimizer": optimizer}
    schedule = {"observe": 1, "every": 1}
    config = make_config(
        {"steps": 3, "training": training, "predictor": "stay", "schedule": schedule, "backend": backend}
    )
    made = make_chosen("backend", config.backend)
    made.prepare(config, out)
    return made


def test_the_chosen_optimizer_trains_with_its_settings_and_the_learning_rate(tmp_path: Path) -> None:
    backend = prepared(tmp_path, 0.25, name="torch.optim:SGD", momentum=0.5)
    backend.train(3, lambda step: None)
    (group, *_) = backend.trainer.optimizer.param_groups
    assert isinstance(backend.trainer.optimizer.optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"]) == (0.25, 0.5)
    with raises_kind("config-invalid-value", "no_such_package:Prodigy"):
        prepared(tmp_path / "other", 0.25, name="no_such_package:Prodigy")


def test_a_schedule_free_run_is_measured_at_its_average_and_trains_on_from_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree", reason="pip install 'next-core[peers]'")
    backend = prepared(tmp_path, 1e-3, name="schedulefree:AdamWScheduleFree")
    measured: list[torch.Tensor] = []

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in backend.trainer.model.parameters() if p.requires_grad])

    def step_ended(step: int) -> None:
        backend._evaluate = lambda model, split: measured.append(weights()) or {}
        before = weights()
        backend.accuracies("test")
        assert torch.equal(weights(), before)
        groups, states = backend.trainer.optimizer.param_groups, backend.trainer.optimizer.optimizer.state
        z = torch.cat([states[p]["z"].flatten() for group in groups for p in group["params"]])
        # It trains at y = .9 x + .1 z, and returns x.
        torch.testing.assert_close(0.9 * measured[-1] + 0.1 * z, before, atol=1e-5, rtol=1e-4)

    backend.train(3, step_ended)
    assert len(measured) == 3
    assert not torch.equal(measured[2], weights())
