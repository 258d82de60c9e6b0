"""The API for notebooks, on a run that PEFT itself wrote."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import next_core as nc
from next_core.mathematics.low_rank import dense
from tests.conftest import LoraRun
from tests.errors import raises_kind


class Twice(nc.Secant):
    """A third party's predictor: the secant's, under another name."""

    name = "twice"


@pytest.fixture(scope="module")
def run(lora_run: LoraRun) -> nc.RecordedRun:
    return nc.open_run(lora_run.path)


@pytest.fixture(scope="module")
def backtest(run: nc.RecordedRun) -> Any:
    return nc.backtest(
        run, [nc.Secant(window=10), Twice, {"name": "secant", "window": 20}, "relex"], horizon=10, draws=2
    )


def test_importing_the_package_imports_neither_torch_nor_pandas_and_lists_every_name() -> None:
    code = (
        "import sys, next_core as nc\n"
        "assert not {'torch', 'pandas', 'pydantic'} & set(sys.modules)\n"
        "assert set(nc.__all__) <= set(dir(nc))\n"
        "for name in nc.__all__: getattr(nc, name)\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_says_its_layout_steps_matrices_and_rank(run: nc.RecordedRun) -> None:
    for fact in ("peft-adapter checkpoint-N", "10 to 60 (6)", "matrices 14", "rank 4", "metrics 12 steps"):
        assert fact in repr(run)
    assert "<th>rank</th><td>4</td>" in run._repr_html_()


def test_a_run_folder_is_opened_as_its_checkpoints_are(own_lora_run: LoraRun) -> None:
    assert nc.open_run(own_lora_run.path.parent).steps == nc.open_run(own_lora_run.path).steps
    assert nc.open_run([own_lora_run.folder(10), own_lora_run.folder(20)]).steps == (10, 20)


def test_metrics_become_a_frame_with_a_row_per_step(run: nc.RecordedRun) -> None:
    frame = run.metrics.to_frame()
    assert list(frame.index) == list(range(5, 61, 5))
    assert frame.loc[20, "reward"] == pytest.approx(0.3)
    assert "12 steps: epoch, reward" in repr(run.metrics)


def test_an_analysis_becomes_frames_and_pictures(run: nc.RecordedRun) -> None:
    analysis = nc.analyze(run, draws=20)
    frame = analysis.to_frame()
    assert set(frame.index) == set(analysis.matrices)
    name = frame.index[0]
    assert frame.loc[name, "c1_r2"] == analysis.matrices[name].value("c1_r2")
    assert set(analysis.to_frame("layer").index) == {0, 1}
    assert "<svg" in analysis.plot("skill")._repr_svg_()
    assert "<figure>" in analysis.plot()._repr_html_()
    assert "13 matrices, steps 10 to 60" in repr(analysis)
    with raises_kind("config-invalid-value", "nothing", "skill"):
        analysis.plot("nothing")


def test_objects_classes_mappings_and_names_are_judged_alike(backtest: Any) -> None:
    assert {"stay", "random", "ridge", "secant", "twice", "relex"} <= {
        name.split("(")[0] for name in backtest.predictors
    }
    frame = backtest.to_frame()
    for name, judged in backtest.predictors.items():
        assert frame.loc[name, "skill"] == pytest.approx(judged.score.skill)
    assert "<svg" in backtest.plot()._repr_svg_()
    assert "horizon 10" in repr(backtest)


def test_a_prediction_hands_out_its_deltas(run: nc.RecordedRun, lora_run: LoraRun) -> None:
    prediction = nc.Secant(window=10, space="merged").fit(run.history(rank=1)).predict(horizon=50)
    name = next(iter(prediction.updates))
    moved = 5 * (lora_run.deltas[60][name] - lora_run.deltas[50][name])
    delta = prediction.delta(name)
    assert torch.allclose(dense(delta), moved, atol=1e-9)
    assert float(delta.norm()) == pytest.approx(float(moved.norm()))
    assert float(prediction.delta("model.layers.1.self_attn.k_proj.weight").norm()) == 0.0
    frame = prediction.to_frame()
    assert frame.loc[name, "norm"] == pytest.approx(float(moved.norm()))
    assert "did not move" in frame.loc["model.layers.1.self_attn.k_proj.weight", "abstained"]
    assert "from step 60 by 50 steps: 13 of 14 matrices move" in repr(prediction)


def test_extrapolate_writes_an_adapter_and_replaces_its_own_alone(run: nc.RecordedRun, tmp_path: Path) -> None:
    out = tmp_path / "jumped"
    nc.extrapolate(run, "rl-extra", horizon=50, out=out)
    first = (out / "adapter_model.safetensors").read_bytes()
    with raises_kind("config-folder-not-empty", out, "overwrite=True"):
        nc.extrapolate(run, "rl-extra", horizon=50, out=out)
    assert nc.extrapolate(run, nc.RLExtra, horizon=20, out=out, overwrite=True).path == out
    assert (out / "adapter_model.safetensors").read_bytes() != first
    nc.extrapolate(run, nc.RLExtra(), horizon=50, out=out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["jumped"]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with raises_kind("config-folder-not-empty", theirs):
        nc.extrapolate(run, "rl-extra", horizon=50, out=theirs, overwrite=True)


def test_extrapolate_does_not_replace_the_model_that_it_reads(lora_run: LoraRun, tmp_path: Path) -> None:
    opened, out = nc.open_run(lora_run.path, lora_run.base), tmp_path / "merged"
    nc.extrapolate(opened, "rl-extra", horizon=50, out=out, applier="merged-model")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    writer = nc.make_applier("merged-model", backbone=out)
    with raises_kind("config-contradiction", out, "being read"):
        nc.extrapolate(opened, "rl-extra", horizon=50, out=out, applier=writer, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
