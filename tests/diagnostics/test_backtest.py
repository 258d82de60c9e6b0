"""The backtest: what it says of runs whose future is known, and against predictions computed whole from less."""

from __future__ import annotations

import itertools
import math
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from next_core import History, open_checkpoints
from next_core.appliers.displacement import displacement, merged
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.backtest_geometry import MeasureMotion
from next_core.diagnostics.backtest_results import Backtest, Score, WalkNull, skill_interval
from next_core.diagnostics.backtest_setting import default_horizon, make_setting
from next_core.errors import CheckpointError, ConfigError, PluginError
from next_core.interfaces import (
    CheckpointSource,
    CoefficientUpdate,
    LoraFactors,
    LowRankUpdate,
    Prediction,
    TrajectoryPredictor,
)
from next_core.lowrank import LowRank, dense
from next_core.per_matrix import Abstain, matrix_predictor
from next_core.plugins import make_predictor, registry
from next_core.sources.memory import MemorySource
from next_core.sources.past import Past, Signs, factor_jumps
from tests.conftest import STEPS, LoraRun
from tests.diagnostics.runs import FIFTEEN, lora_walks, name, straight, walks
from tests.predictors.trajectories import (
    curve,
    curved_lora_run,
    dense_run,
    drift,
    linear_lora_run,
    noise,
    resolve_dense,
)
from tests.sources.test_jumps import jump, moved

Fields = Mapping[str, Mapping[str, Any]]
ALONE: Fields = {
    "secant": {"window": 10},
    "rl-extra": {},
    "relex": {},
    "ridge": {},
    "alpharl": {"min_t": 0},
    "random": {"rank": 2},
}


@pytest.fixture
def register() -> Iterator[Callable[[type[Any]], None]]:
    """``register(predictor)`` for this test alone."""
    added = []

    def add(cls: type[Any]) -> None:
        registry().add(cls)
        added.append(cls.name)

    yield add
    for each in added:
        registry()._entries.pop(("predictor", each))


def whole(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Score:
    """Figures of P and D given as whole matrices."""
    P, D = (torch.cat([one[key].flatten() for key in sorted(one)]) for one in (found, wanted))
    return Score.of(torch.stack([P @ P, P @ D, D @ D]))


def replayed(
    seen: Callable[[int], CheckpointSource],
    after: Callable[[int], CheckpointSource],
    cuts: tuple[int, ...],
    horizon: int,
    predictor: str,
    fields: Mapping[str, Any],
) -> Score:
    """The pooled figures, from a run that has nothing after each cut, and the motion that followed, all dense."""
    found, wanted = {}, {}
    for cut in cuts:
        past, future = seen(cut), after(cut + horizon)
        prediction = make_predictor(predictor, **fields).fit(History(past)).predict(horizon)
        for parameter in past.parameters:
            key = f"{cut} {parameter.name}"
            wanted[key] = dense(future.delta(parameter.name, cut + horizon, cut)).double()
            found[key] = moves(prediction, parameter.name, wanted[key])
    return whole(found, wanted)


def moves(prediction: Prediction, key: str, like: Tensor) -> Tensor:
    """P as a whole matrix: by the interface's words, or the applier's where step 0 cannot be read."""
    if prediction.abstention is not None or key not in prediction.updates:
        return 0 * like
    update = prediction.updates[key]
    if isinstance(update, CoefficientUpdate) and update.space == "factors" and 0 not in prediction.source.steps:
        step = displacement(prediction, key, 1.0)
        assert step is not None
        return dense(merged(step)).double()
    return resolve_dense(prediction, key)


def until(source: MemorySource, step: int) -> MemorySource:
    """A run of its own that ends at a step."""
    kept = {t: value for t, value in source._checkpoints.items() if t <= step}
    return MemorySource(kept, source._backbone, source._metrics)


def walked(source: MemorySource, signs: Signs) -> MemorySource:
    """The run with its increments signed, built checkpoint by checkpoint."""
    steps, made = source.steps, dict(source._checkpoints)
    for parameter in source.parameters:
        eps = dict(zip(signs.steps, signs.of(parameter.name).tolist(), strict=True))
        values = [source._value(parameter.name, step) for step in steps]
        now: Any = values[0]
        if isinstance(now, Tensor):
            first = source._backbone[parameter.name]
            now = first + eps.get(steps[0], 1.0) * (now - first)
        for before, after in itertools.pairwise(range(len(steps))):
            made[steps[before]] = {**made[steps[before]], parameter.name: now}
            old, new = values[before], values[after]
            sign = eps[steps[after]]
            if isinstance(old, LoraFactors) and isinstance(new, LoraFactors):
                now = LoraFactors(now.A + sign * (new.A - old.A), now.B + sign * (new.B - old.B), new.scaling)
            else:
                now = now + sign * (new - old)  # type: ignore[operator]
        made[steps[-1]] = {**made[steps[-1]], parameter.name: now}
    return MemorySource(made, source._backbone, source._metrics)


def assert_close(found: Score, wanted: Score, tolerance: float = 1e-7) -> None:
    for key, value in wanted.as_dict().items():
        assert found.as_dict()[key] == (
            None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)
        ), key


def dense_curves() -> MemorySource:
    return dense_run({"a": curve(1), "b": curve(40, 4, 9)})


def whole_lora() -> MemorySource:
    return curved_lora_run()


def without_step_0() -> MemorySource:
    return curved_lora_run(tuple(range(10, 110, 10)))


@pytest.mark.parametrize("make", [dense_curves, whole_lora, without_step_0])
def test_every_figure_is_that_of_whole_matrices_and_of_a_run_that_ends_at_the_cut(
    make: Callable[[], MemorySource],
) -> None:
    source = make()
    fields = {**ALONE, "secant": {"window": 10, "space": "factors"}}
    found = backtest(source, fields, horizon=20, draws=0)
    assert found.cuts == tuple(range(10, 90, 10))
    for predictor, given in fields.items():
        wanted = replayed(lambda t: until(source, t), lambda t: source, found.cuts, 20, predictor, given)
        judged = found.predictors[predictor]
        assert_close(judged.score, wanted)
        assert not judged.failures
        assert judged.acted > 0


@pytest.mark.parametrize("make", [dense_curves, whole_lora])
def test_the_null_is_the_skill_on_the_run_with_its_increments_signed(make: Callable[[], MemorySource]) -> None:
    source = make()
    found = backtest(source, ALONE, horizon=20, draws=2, seed=3)
    for predictor, given in ALONE.items():
        skills = []
        for draw in (1, 2):
            walk = walked(source, Signs(3, draw, tuple(t for t in source.steps if t > 0)))
            score = replayed(lambda t, w=walk: until(w, t), lambda t, w=walk: w, found.cuts, 20, predictor, given)  # type: ignore[misc]
            skills.append(score.skill)
        wanted = WalkNull.of(found.predictors[predictor].score.skill, skills)
        null = found.predictors[predictor].null
        assert null is not None
        assert wanted is not None
        assert null.mean == pytest.approx(wanted.mean, rel=1e-6, abs=1e-7)
        assert null.high == pytest.approx(wanted.high, rel=1e-5, abs=1e-6)


def test_walks_of_a_matrix_are_signs_of_its_own_and_the_same_whatever_else_there_is() -> None:
    signs = Signs(0, 1, FIFTEEN)
    a, b = signs.of("a"), signs.of("b")
    assert set(a.tolist()) == {-1.0, 1.0}
    assert not torch.equal(a, b)
    assert torch.equal(a, Signs(0, 1, FIFTEEN).of("a"))
    assert not torch.equal(a, Signs(0, 2, FIFTEEN).of("a"))
    assert not torch.equal(a, Signs(1, 1, FIFTEEN).of("a"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_straight_line_is_predicted_exactly(lora: bool) -> None:
    source = linear_lora_run() if lora else straight()
    found = backtest(source, ["secant", "rl-extra"], horizon=10, draws=40)
    for predictor in ("secant", "rl-extra"):
        judged = found.predictors[predictor]
        assert judged.score.skill == pytest.approx(1, abs=1e-9)
        assert judged.score.cosine == pytest.approx(1, abs=1e-9)
        assert judged.score.norm_ratio == pytest.approx(1, abs=1e-9)
        assert judged.score.best_lambda == pytest.approx(1, abs=1e-9)
        assert judged.score.rel_error == pytest.approx(0, abs=1e-4)
        assert judged.interval == (pytest.approx(1), pytest.approx(1))
        assert judged.above_null
        assert judged.useful
        assert judged.abstained == 0
    assert list(found.predictors)[-1] in {"random", "stay"}


def test_a_quadratic_has_the_figures_of_its_formula() -> None:
    direction = noise(1, 7, 5)
    direction /= direction.norm()
    found = backtest(dense_run({"a": lambda t: t**2 * direction}, FIFTEEN), ["secant"], horizon=10, draws=0)
    # P = t^2 - (t - h)^2 = 2th - h^2 and D = (t + h)^2 - t^2 = 2th + h^2, one along the other
    P = [2 * t * 10 - 100 for t in found.cuts]
    D = [2 * t * 10 + 100 for t in found.cuts]
    DD, PP, PD = sum(d * d for d in D), sum(p * p for p in P), sum(p * d for p, d in zip(P, D, strict=True))
    judged = found.predictors["secant"]
    assert found.cuts == tuple(range(10, 150, 10))
    assert judged.score.skill == pytest.approx(1 - sum((p - d) ** 2 for p, d in zip(P, D, strict=True)) / DD, rel=1e-9)
    assert judged.score.rel_error == pytest.approx(math.sqrt(200**2 * 14 / DD), rel=1e-9)
    assert judged.score.cosine == pytest.approx(PD / math.sqrt(PP * DD), rel=1e-9)
    assert judged.score.norm_ratio == pytest.approx(math.sqrt(PP / DD), rel=1e-9)
    assert judged.score.best_lambda == pytest.approx(PD / PP, rel=1e-9)
    assert judged.score.damped_skill == pytest.approx(PD**2 / PP / DD, rel=1e-9)
    assert judged.by_cut[1] == pytest.approx(1 - 200**2 / D[1] ** 2, rel=1e-9)


def test_what_points_backwards_gains_nothing_by_damping() -> None:
    backwards = Score.of(torch.tensor([4.0, -1.0, 1.0]))
    assert (backwards.skill, backwards.best_lambda, backwards.cosine) == (-6.0, -0.25, -0.5)
    assert backwards.damped_skill == 0.0
    assert Score.of(torch.zeros(3)) == Score()
    assert Score.of(torch.tensor([0.0, 0.0, 2.0])) == Score(0.0, 1.0, None, 0.0, None, 0.0)


@pytest.mark.parametrize("lora", [False, True])
def test_on_a_random_walk_nothing_beats_its_null_and_staying_is_zero(lora: bool) -> None:
    steps = tuple(range(10, 260, 10))
    source = lora_walks(4, (0, *steps)) if lora else walks(4, steps, m=30, n=20)
    found = backtest(source, horizon=20)
    stay = found.predictors["stay"]
    assert stay.score.skill == 0.0
    assert stay.interval == (0.0, 0.0)
    assert stay.null is not None
    assert (stay.null.mean, stay.null.high) == (0.0, 0.0)
    assert stay.abstained == 1.0
    assert not any(judged.useful for judged in found.predictors.values())
    assert not any(judged.above_null for judged in found.predictors.values())
    for predictor in ("secant", "random", "ridge"):
        judged = found.predictors[predictor]
        assert judged.score.skill is not None
        assert judged.null is not None
        assert judged.score.skill < 0.05
        assert judged.score.norm_ratio is not None
        assert judged.score.cosine == pytest.approx(0, abs=0.05)
    assert found.predictors["secant"].score.best_lambda == pytest.approx(0, abs=0.05)
    assert found.predictors["secant"].score.skill == pytest.approx(-1, abs=0.15)


def test_a_random_direction_is_as_long_as_recent_motion_and_leads_nowhere() -> None:
    judged = backtest(walks(4, m=60, n=50), [], horizon=20, draws=0).predictors["random"]
    assert judged.acting.norm_ratio == pytest.approx(1, abs=0.05)
    assert judged.acting.cosine == pytest.approx(0, abs=0.02)
    assert judged.acting.skill == pytest.approx(-1, abs=0.1)


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


def test_what_goes_wrong_is_reported_and_ends_nothing(register: Callable[[type[Any]], None]) -> None:
    class Wrong(TrajectoryPredictor):
        name = "wrong"

        def fit(self, history: History) -> Wrong:
            self.history = history
            return self

        def predict(self, horizon: int) -> Any:
            history = self.history
            newest, nan = history.newest, torch.full((7, 1), torch.nan)
            updates: dict[int, Any] = {
                20: LowRankUpdate(LowRank(nan, torch.ones(1, 5))),
                30: CoefficientUpdate({newest: math.inf}),
                40: CoefficientUpdate({newest + 10: 1.0}),
                50: LowRankUpdate(LowRank(torch.ones(5, 1), torch.ones(1, 7))),
                60: "an update",
            }
            if newest == 10:
                raise ZeroDivisionError("by hand")
            if newest == 70:
                return None
            key = "elsewhere" if newest == 80 else name(0)
            step = 10 if newest == 90 else newest
            update = updates.get(newest, CoefficientUpdate({newest: horizon / newest}))
            return Prediction(history.source, step, horizon, updates={key: update})

    register(Wrong)
    found = backtest(straight(), ["wrong", "secant"], horizon=10, draws=2)
    judged = found.predictors["wrong"]
    assert {failure.cut: failure.reason for failure in judged.failures} == {
        10: "ZeroDivisionError: by hand",
        20: f"GuardError: the prediction of '{name(0)}' is not finite",
        30: f"GuardError: the prediction of '{name(0)}' is not finite",
        40: f"CheckpointError: '{name(0)}': step 50 was not observed; observed: (10, 20, 30, 40)",
        50: f"PluginError: the update of '{name(0)}' is (5, 7), the parameter (7, 5)",
        60: f"PluginError: '{name(0)}': str is no update",
        70: "predict answered NoneType; return a Prediction",
        80: "the prediction names 'elsewhere', which the run does not have",
        90: "the prediction counts from step 10, but the newest observed is 90",
    }
    assert judged.acted == 5
    assert judged.abstained == 0
    assert judged.score.skill == pytest.approx(5 / 14)
    assert judged.acting.skill == pytest.approx(1)
    assert found.predictors["secant"].score.skill == pytest.approx(1)


def test_the_same_seed_gives_the_same_answer_and_another_one_another_interval() -> None:
    source = dense_curves()

    def told(seed: int) -> dict[str, Any]:
        found = backtest(source, ["secant"], horizon=20, draws=3, seed=seed).as_dict()
        found.pop("shared_seconds")
        for judged in found["predictors"].values():
            judged.pop("seconds")
        return found

    first, again, other = told(0), told(0), told(1)
    assert first == again
    for key in ("skill_low", "null_skill"):
        assert first["predictors"]["secant"][key] != other["predictors"]["secant"][key]
    assert first["predictors"]["secant"]["skill"] == other["predictors"]["secant"]["skill"]


def test_the_interval_is_that_of_resampled_blocks() -> None:
    # Errors good and bad in runs of four. The mean of 160 single cuts has sd .5 / sqrt(160) = .0395. Blocks of four
    # have means of .5, .75, 1, 1.25 and 1.5 with variance .09375: 40 of them have sd .0484.
    error = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5] * 20, dtype=torch.float64)
    sums = torch.stack([error, torch.full_like(error, 0.5), torch.ones_like(error)], 1)  # |P - D|^2 = error
    alone, blocks = skill_interval(sums, 1, 0), skill_interval(sums, 4, 0)
    assert alone is not None
    assert blocks is not None
    assert alone == (pytest.approx(-1.96 * 0.0395, abs=0.008), pytest.approx(1.96 * 0.0395, abs=0.008))
    assert blocks == (pytest.approx(-1.96 * 0.0484, abs=0.008), pytest.approx(1.96 * 0.0484, abs=0.008))
    assert skill_interval(sums[:7], 4, 0) is None
    assert skill_interval(sums[:8], 4, 0) is not None


def test_the_horizon_and_the_cuts_are_chosen_sensibly() -> None:
    assert default_horizon(FIFTEEN) == 20
    assert default_horizon((0, 5, 10, 15)) == 10
    assert default_horizon((10, 20)) == 10
    assert default_horizon((10, 20, 30, 45, 60, 75)) == 30
    setting = make_setting(walks(1), None, 4, 0, 0, FIFTEEN)
    assert (setting.horizon, setting.cuts, setting.block) == (20, (40, 70, 100, 130), 1)
    setting = make_setting(walks(1), 50, None, 0, 0, FIFTEEN)
    assert (setting.cuts, setting.block) == (tuple(range(10, 110, 10)), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "at least 1 RL step"),
        ({"horizon": 15}, "no two checkpoints lie 15 steps apart; horizons that are: 10, 20"),
        ({"draws": 1}, "at least 2"),
        ({"cuts": 0}, "cuts must be at least 1"),
        ({"predictors": {"secant": {"windw": 5}}}, "did you mean 'window'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backtest(straight(), **options)


def test_an_unknown_predictor_and_too_short_a_run_are_refused() -> None:
    with pytest.raises(PluginError, match="Did you mean 'secant'"):
        backtest(straight(), ["secnt"])
    with pytest.raises(CheckpointError, match="at least 2 checkpoints"):
        backtest(straight((10,)))


def test_nan_in_a_checkpoint_is_named() -> None:
    source = straight()
    source._checkpoints[50][name(0)] = torch.full((7, 5), torch.nan).double()
    with pytest.raises(CheckpointError, match=f"'{name(0)}' holds NaN"):
        backtest(source, horizon=10)


def test_what_runs_elsewhere_can_be_sent_there(lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    setting = make_setting(source, 10, None, 2, 0, source.steps)
    key = "model.layers.0.self_attn.q_proj.weight"
    sent = pickle.loads(pickle.dumps(MeasureMotion(setting)))
    assert torch.equal(sent(key).whole, MeasureMotion(setting)(key).whole)
    past = pickle.loads(pickle.dumps(setting.past(1, 30)))
    assert torch.equal(past.factors(key, 20).B, setting.past(1, 30).factors(key, 20).B)


def test_as_plain_objects_it_has_what_the_page_lists() -> None:
    found: Backtest = backtest(straight(), ["secant"], horizon=10, draws=2)
    plain = found.as_dict()
    assert plain["horizon"] == 10
    assert plain["cuts"] == list(range(10, 150, 10))
    secant = plain["predictors"]["secant"]
    assert {"skill", "skill_low", "skill_high", "null_skill", "null_high", "rel_error", "cosine", "norm_ratio"} < set(
        secant
    )
    assert {"lambda", "damped_skill", "abstained", "seconds", "per_matrix", "failures"} < set(secant)
    assert secant["per_matrix"][name(0)]["skill"] == pytest.approx(1)
