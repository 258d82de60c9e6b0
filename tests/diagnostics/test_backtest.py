"""The backtest: what it says of runs whose future is known, and against predictions computed whole from less."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from next_core import History, open_checkpoints
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.backtest_geometry import MeasureMotion
from next_core.diagnostics.backtest_inputs import default_horizon, make_setting
from next_core.diagnostics.backtest_results import Backtest, Score, WalkNull, skill_interval
from next_core.errors import CheckpointError, ConfigError, PluginError
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import TrajectoryPredictor
from next_core.sources.memory import MemorySource
from next_core.sources.replay import Signs
from tests.conftest import LoraRun
from tests.diagnostics.replayed import (
    ALONE,
    assert_close,
    dense_curves,
    replayed,
    until,
    walked,
    whole_lora,
    without_step_0,
)
from tests.diagnostics.runs import FIFTEEN, lora_walks, name, straight, walks
from tests.predictors.trajectories import (
    dense_run,
    linear_lora_run,
    noise,
)


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
