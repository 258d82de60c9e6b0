"""What a backtest shows a predictor: the run as it was at the cut, and nothing later."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from next_core import History, open_checkpoints
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.backtest_results import Score
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank, dense
from next_core.plugins import make_predictor, registry
from next_core.predictor import Abstain, TrajectoryPredictor, matrix_predictor
from next_core.sources.memory import MemorySource
from next_core.sources.replay import Past, Signs, factor_jumps
from next_core.types import LoraFactors
from tests.conftest import STEPS, LoraRun
from tests.diagnostics.replayed import (
    ALONE,
    assert_close,
    dense_curves,
    replayed,
    walked,
    whole_lora,
)
from tests.diagnostics.runs import FIFTEEN, name, straight
from tests.predictors.trajectories import (
    curve,
    curved_lora_run,
    dense_run,
    drift,
    noise,
)
from tests.sources.test_jumps import jump, moved


class Recording(TrajectoryPredictor):
    """Passes on what another predictor says, and keeps it."""

    name = "recording"
    requires = frozenset({"global", "local", "target", "gram"})
    inner: ClassVar[str] = ""
    fields: ClassVar[Mapping[str, Any]] = {}
    said: ClassVar[dict[int, Prediction]] = {}

    def fit(self, history: History) -> Recording:
        self.made = make_predictor(self.inner, **self.fields).fit(history)
        self.newest = history.newest
        return self

    def predict(self, horizon: int) -> Prediction:
        self.said[self.newest] = self.made.predict(horizon)
        return self.said[self.newest]


@pytest.mark.parametrize("make", [dense_curves, whole_lora])
@pytest.mark.parametrize("inner", ["secant", "relex", "ridge", "alpharl", "next-mlp-reduced"])
def test_what_is_changed_after_a_cut_does_not_change_its_prediction(
    inner: str, make: Callable[[], MemorySource], register: Callable[[type[Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(Recording)
    fields = {
        "next-mlp-reduced": {"epochs": 5},
        "secant": {"gate": {"window": 10, "floor": -99, "width": 999, "median_floor": -99}},
    }
    source, other = make(), make()
    for step in (80, 90, 100):
        for key, value in other._checkpoints[step].items():
            changed = noise(step, 7, 2)
            if isinstance(value, LoraFactors):
                other._checkpoints[step][key] = LoraFactors(value.A + 1, value.B + changed, value.scaling)
            else:
                other._checkpoints[step][key] = value + noise(step, *value.shape)
    said: list[dict[int, Prediction]] = []
    for run in (source, other):
        said.append({})
        monkeypatch.setattr(Recording, "said", said[-1])
        monkeypatch.setattr(Recording, "inner", inner)
        monkeypatch.setattr(Recording, "fields", fields.get(inner, {}))
        backtest(run, ["recording"], horizon=20, draws=0)
    assert set(said[0]) == set(range(10, 90, 10))
    acted = 0
    for cut in range(10, 80, 10):
        first, second = (each[cut] for each in said)
        assert (first.abstention, dict(first.abstained)) == (second.abstention, dict(second.abstained))
        assert dict(first.confidence) == dict(second.confidence)
        assert first.updates.keys() == second.updates.keys()
        for key in first.updates:
            assert torch.equal(resolve(first, key), resolve(second, key))
            acted += 1
    assert acted
    assert any(not torch.equal(resolve(said[0][80], key), resolve(said[1][80], key)) for key in said[0][80].updates)


def resolve(prediction: Prediction, key: str) -> Tensor:
    """An update's own numbers, with its confidence."""
    update, weight = prediction.updates[key], prediction.weight(key)
    if isinstance(update, CoefficientUpdate):
        return torch.tensor([*update.weights, *update.weights.values(), weight], dtype=torch.float64)
    assert isinstance(update, LowRankUpdate)
    return weight * update.matrix.dense()


@pytest.mark.parametrize("signs", [None, Signs(0, 1, tuple(range(10, 110, 10)))])
def test_the_past_shows_nothing_later(signs: Signs | None) -> None:
    metrics = {step: {"reward": step / 100} for step in range(5, 105, 5)}
    run = curved_lora_run()
    source = MemorySource(run._checkpoints, metrics=metrics)
    past = Past(source, 50, signs)
    assert past.steps == (0, 10, 20, 30, 40, 50)
    assert History(past).metrics("reward")[-1] == 0.5
    for look in (
        lambda: past.delta("a", 60),
        lambda: past.delta("a", 50, 60),
        lambda: past.delta_rows("a", slice(0, 1), 60),
        lambda: past.factors("a", 60),
        lambda: past.metrics(60),
        lambda: past.fingerprint(60),
    ):
        with pytest.raises(CheckpointError, match="step 60 lies after step 50"):
            look()


def test_a_predictor_that_looks_ahead_is_found_out(register: Callable[[type[Any]], None]) -> None:
    @matrix_predictor("prophet")
    def prophet(matrix: Any, horizon: int, config: Any) -> CoefficientUpdate:
        delta = matrix.history.source.delta(matrix.name, matrix.steps[-1] + horizon, matrix.steps[-1])
        return CoefficientUpdate({matrix.steps[-1]: float(delta.sum())})

    register(prophet)
    judged = backtest(straight(), ["prophet"], horizon=10, draws=0).predictors["prophet"]
    assert len(judged.failures) == 14
    assert judged.failures[0].reason.startswith("CheckpointError: step 20 lies after step 10")
    assert judged.score.skill == 0.0


def test_a_signed_dense_past_is_read_by_rows_as_it_is_read_whole() -> None:
    source = dense_run({"a": curve(1)})
    signs = Signs(0, 1, source.steps)
    past, wanted = Past(source, 80, signs), walked(source, signs)
    for step, since in ((80, None), (70, 20), (20, 70), (30, 30)):
        delta = wanted.delta("a", step, since)
        torch.testing.assert_close(dense(past.delta("a", step, since)), dense(delta))
        torch.testing.assert_close(past.delta_rows("a", slice(2, 5), step, since), dense(delta)[2:5])


def test_an_abstention_counts_as_staying_and_the_cuts_acted_at_are_told_apart(
    register: Callable[[type[Any]], None],
) -> None:
    @matrix_predictor("sometimes")
    def sometimes(matrix: Any, horizon: int, config: Any) -> Any:
        newest = matrix.steps[-1]
        if newest % 20 == 0:
            return Abstain("not at even tens")
        return CoefficientUpdate({newest: horizon / newest})  # right for t^1

    register(sometimes)
    direction = noise(1, 7, 5)
    judged = backtest(
        dense_run({"a": lambda t: t * direction}, FIFTEEN), ["sometimes"], horizon=20, draws=0
    ).predictors["sometimes"]
    assert judged.acted == 7  # 10, 30, ... 130 of 10, 20, ... 130
    assert judged.abstained == pytest.approx(6 / 13)
    assert judged.reasons == {"not at even tens": 6}
    assert judged.acting.skill == pytest.approx(1, abs=1e-12)
    assert judged.score.skill == pytest.approx(7 / 13)
    assert judged.score.rel_error == pytest.approx(math.sqrt(6 / 13))
    assert judged.by_cut[1] == 0.0


def test_confidence_scales_what_is_predicted(register: Callable[[type[Any]], None]) -> None:
    @matrix_predictor("half", config=registry().get("predictor", "relex").config_class)
    def half(matrix: Any, horizon: int, config: Any) -> Any:
        newest = matrix.steps[-1]
        c = horizon / newest
        if matrix.name == name(1):
            return LowRankUpdate(LowRank(torch.full((7, 1), c), torch.ones(1, 5))), 0.5
        return CoefficientUpdate({newest: c}), 0.5

    register(half)
    paths = {name(0): drift(1), name(1): lambda t: t * torch.ones(7, 5).double() / 10}
    judged = backtest(dense_run(paths), ["half"], horizon=10, draws=0).predictors["half"]
    score, _ = judged.per_matrix[name(0)]
    assert score.skill == pytest.approx(0.75)
    assert score.best_lambda == pytest.approx(2)
    ratios = [0.5 * 10 / t for t in range(10, 100, 10)]
    score, _ = judged.per_matrix[name(1)]
    assert score.norm_ratio == pytest.approx(math.sqrt(sum(r * r for r in ratios) / len(ratios)), rel=1e-6)


def reopened(run: LoraRun, target: Path, step: int) -> CheckpointSource:
    """The run folder as it was when a step had been observed: no later checkpoint, no jump made since."""
    root = target / f"at-{step}"
    if not root.exists():
        shutil.copytree(run.path.parent, root)
        for folder in (root / "checkpoints").iterdir():
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)
        for number, made in (("0001", 30), ("0002", 50)):
            if made >= step:
                shutil.rmtree(root / "jumps" / number)
    return open_checkpoints(root / "checkpoints")


def test_jumps_of_a_run_folder_count_as_they_did_when_the_cut_was_reached(
    own_lora_run: LoraRun, tmp_path: Path
) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    jump(own_lora_run, 2, 50, moved("t"))
    found = backtest(open_checkpoints(own_lora_run.path), ALONE, horizon=20, draws=0)
    assert found.cuts == (10, 20, 30, 40)
    for predictor, given in ALONE.items():
        wanted = replayed(
            lambda t: reopened(own_lora_run, tmp_path, t),
            lambda t: reopened(own_lora_run, tmp_path, t),
            found.cuts,
            20,
            predictor,
            given,
        )
        judged = found.predictors[predictor]
        assert not judged.failures
        assert_close(judged.score, wanted, 1e-4)  # jumps are added to the checkpoints in fp32


def test_before_its_first_jump_a_run_began_with_nothing(own_lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    jump(own_lora_run, 2, 50, moved("t"))
    key, source = "model.layers.0.self_attn.q_proj.weight", open_checkpoints(own_lora_run.path)
    past = [Past(source, step, None, factor_jumps(source)) for step in (30, 40)]
    assert source.start(key) is not None
    assert past[0].start(key) is None  # the jumps are taken out to the last bit, so that B is zero again
    started = past[1].start(key)
    assert started is not None
    torch.testing.assert_close(started.B.float(), moved("s")[f"{key}.lora_B"])


def test_a_jump_made_after_a_cut_does_not_change_its_prediction(
    own_lora_run: LoraRun, register: Callable[[type[Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(Recording)
    monkeypatch.setattr(Recording, "inner", "ridge")
    said: list[dict[int, Prediction]] = []
    for seed in ("t", "u"):
        folder = jump(own_lora_run, 1, 40, moved(seed))
        said.append({})
        monkeypatch.setattr(Recording, "said", said[-1])
        backtest(open_checkpoints(own_lora_run.path), ["recording"], horizon=10, draws=0)
        shutil.rmtree(folder)
    key = "model.layers.0.self_attn.q_proj.weight"
    for cut in (20, 30, 40):
        torch.testing.assert_close(*(resolve(each[cut], key) for each in said), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*(resolve(each[50], key) for each in said), atol=1e-2, rtol=1e-2)


def test_a_recorded_run_has_walks_and_a_cache_too(lora_run: LoraRun) -> None:
    found = backtest(open_checkpoints(lora_run.path), {"secant": {}, "alpharl": {}}, horizon=10, draws=5)
    assert found.cuts == STEPS[:-1]
    assert not any(judged.failures for judged in found.predictors.values())
    secant = found.predictors["secant"]
    assert secant.useful
    frozen, _ = secant.per_matrix["model.layers.1.self_attn.k_proj.weight"]
    assert frozen == Score()
