"""Several alphas of one prediction: folders that differ in how far they jump, and in nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core import make_applier, open_checkpoints
from next_core.appliers import adapter_applier as peft_adapter
from next_core.appliers.alpha_sweep import apply_sweep
from next_core.errors import ConfigError, GuardError
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.mathematics.low_rank import LowRank
from next_core.storage.manifest import check_manifest
from tests.conftest import LoraRun, noise

ALPHAS = [0.5, 1, 2.0]
ROW = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def run(make_lora_run: Callable[..., LoraRun], tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    return make_lora_run(tmp_path_factory.mktemp("run") / "checkpoints", (0, 10, 20))


def predict(run: LoraRun, what: str) -> Prediction:
    updates: dict[str, Update] = {}
    for name, delta in run.deltas[20].items():
        low = LowRank(noise(name + "l", delta.shape[0], 1), noise(name + "r", 1, delta.shape[1]))
        updates[name] = {
            "low rank": LowRankUpdate(low),
            "merged": CoefficientUpdate({20: 1.0, 10: -1.0}),
            "factors": CoefficientUpdate({20: 1.0, 10: -1.0}, "factors"),
        }[what]
    return Prediction(open_checkpoints(run.path, backbone=run.base), 20, 10, updates=updates)


def factors(folder: Path, name: str) -> tuple[Tensor, Tensor, float]:
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"].double() for side in "AB")
    config = json.loads((folder / "adapter_config.json").read_text())
    return A, B, config["lora_alpha"] / config["r"]


@pytest.mark.parametrize("what", ["low rank", "merged", "factors"])
@pytest.mark.parametrize("applier", ["peft-adapter", "merged-model"])
def test_each_folder_is_that_of_its_alpha_alone(run: LoraRun, tmp_path: Path, what: str, applier: str) -> None:
    found = apply_sweep(make_applier(applier), predict(run, what), ALPHAS, tmp_path / "out")
    assert {alpha: folder.path for alpha, folder in found.items()} == {
        0.5: tmp_path / "out" / "alpha-0.5",
        1.0: tmp_path / "out" / "alpha-1",
        2.0: tmp_path / "out" / "alpha-2",
    }
    check_manifest(tmp_path / "out")
    for alpha, folder in found.items():
        check_manifest(folder.path)
        make_applier(applier).apply(predict(run, what), alpha, out=tmp_path / f"{alpha}")
        [weights] = folder.path.glob("*.safetensors")
        one, alone = load_file(weights), load_file(tmp_path / f"{alpha}" / weights.name)
        assert one.keys() == alone.keys()
        for key in one:
            torch.testing.assert_close(one[key], alone[key], atol=1e-6, rtol=1e-5)
        assert json.loads((folder.path / "extrapolation.json").read_text())["alpha"] == alpha
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "alpha-0.5", "alpha-1", "alpha-2", "manifest.json",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["low rank", "merged"])
def test_in_merged_space_the_adapters_share_a_and_are_linear_in_alpha(run: LoraRun, tmp_path: Path, what: str) -> None:
    found = apply_sweep(make_applier("peft-adapter"), predict(run, what), ALPHAS, tmp_path / "out")
    for name in run.deltas[20]:
        at = {alpha: factors(folder.path, name) for alpha, folder in found.items()}
        assert torch.equal(at[0.5][0], at[1.0][0])
        assert torch.equal(at[0.5][0], at[2.0][0])
        moved = {alpha: s * B @ A - run.deltas[20][name] for alpha, (A, B, s) in at.items()}
        for alpha in (0.5, 2.0):
            torch.testing.assert_close(moved[alpha], alpha * moved[1.0], atol=1e-6, rtol=1e-4)


def test_in_factor_space_the_move_of_a_and_b_is_linear_in_alpha(run: LoraRun, tmp_path: Path) -> None:
    found = apply_sweep(make_applier("peft-adapter"), predict(run, "factors"), ALPHAS, tmp_path / "out")
    for name in run.deltas[20]:
        A, B, _ = factors(run.folder(20), name)
        at = {alpha: factors(folder.path, name) for alpha, folder in found.items()}
        for alpha in (0.5, 2.0):
            torch.testing.assert_close(at[alpha][0] - A, alpha * (at[1.0][0] - A), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(at[alpha][1] - B, alpha * (at[1.0][1] - B), atol=1e-6, rtol=1e-4)


def test_a_displacement_is_computed_once_for_all_alphas(
    run: LoraRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = peft_adapter.resolved

    def counting(prediction: Prediction, name: str, alpha: float) -> Any:
        names.append(name)
        return real(prediction, name, alpha)

    monkeypatch.setattr(peft_adapter, "resolved", counting)
    apply_sweep(make_applier("peft-adapter"), predict(run, "merged"), ALPHAS, tmp_path / "out")
    assert sorted(names) == sorted(run.deltas[20])


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([1, 2, 1.0], "share the folder alpha-1"),
        ([1, 1.00000001], "share the folder alpha-1"),
        ([], "at least one alpha"),
        ([1, 0], r"above 0 \(got 0\)"),
        ([-1], r"above 0 \(got -1\)"),
        ([math.inf], r"above 0 \(got inf\)"),
        ([math.nan], r"above 0 \(got nan\)"),
    ],
)
def test_alphas_that_make_no_sense_are_refused(run: LoraRun, tmp_path: Path, alphas: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_sweep(make_applier("peft-adapter"), predict(run, "merged"), alphas, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"in_place": True}])
def test_a_sweep_in_place_or_into_a_live_model_is_refused(
    run: LoraRun, tmp_path: Path, options: dict[str, Any]
) -> None:
    for applier in (make_applier("merged-model", **options), make_applier("in-memory")):
        with pytest.raises(ConfigError, match="makes no new folders"):
            apply_sweep(applier, predict(run, "merged"), ALPHAS, tmp_path / "out")


def test_one_alpha_that_overflows_leaves_none(run: LoraRun, tmp_path: Path) -> None:
    huge = LowRankUpdate(LowRank(torch.full((16, 1), 1e37), torch.ones(1, 16)))
    prediction = Prediction(open_checkpoints(run.path, run.base), 20, 10, updates={ROW: huge})
    with pytest.raises(GuardError, match=f"'{ROW}' overflows float32 after the jump; nothing was written"):
        apply_sweep(make_applier("peft-adapter"), prediction, [1, 100], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept(run: LoraRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        apply_sweep(make_applier("peft-adapter"), predict(run, "merged"), ALPHAS, tmp_path / "out")


def test_rolling_back_one_leaves_the_others(run: LoraRun, tmp_path: Path) -> None:
    found = apply_sweep(make_applier("peft-adapter"), predict(run, "merged"), ALPHAS, tmp_path / "out")
    found[1.0].rollback()
    assert sorted(path.name for path in (tmp_path / "out").glob("alpha*")) == ["alpha-0.5", "alpha-2"]
