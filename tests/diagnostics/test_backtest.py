"""The backtest: what it finds in runs whose future is known, against predictions computed from whole matrices."""

import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from next_core import open_checkpoints
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.backtest_results import Judged, Score, WalkNull, skill_interval
from next_core.diagnostics.replay import default_horizon, make_replay
from next_core.interfaces import CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import Abstain, TrajectoryPredictor, matrix_predictor
from next_predictors.secant import Secant
from tests.conftest import LoraRun
from tests.diagnostics.replayed import ALONE, RUNS, assert_close, replayed, until, walked
from tests.diagnostics.runs import FIFTEEN, lora_walks, name, straight, walks
from tests.errors import raises_kind
from tests.predictors.trajectories import dense_run, drift, noise
from tests.sources.test_jumps import jump, moved


def judge(source: CheckpointSource, predictor: Any, horizon: int = 10) -> Judged:
    found = backtest(source, [predictor], horizon=horizon, draws=0)
    return next(one for key, one in found.predictors.items() if key not in ("stay", "random", "ridge"))


# Against whole matrices


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())
def test_every_figure_is_that_of_whole_matrices_and_of_a_run_that_ends_at_the_cut(make: Any) -> None:
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


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())
def test_the_null_is_the_skill_on_the_run_with_its_increments_signed(make: Any) -> None:
    source, some = make(), {key: ALONE[key] for key in ("secant", "alpharl", "random")}
    found = backtest(source, some, horizon=20, cuts=4, draws=2, seed=3)
    for predictor, given in some.items():
        skills = []
        for draw in (1, 2):
            walk = walked(source, 3, draw)
            score = replayed(lambda t, w=walk: until(w, t), lambda t, w=walk: w, found.cuts, 20, predictor, given)
            skills.append(score.skill)
        null = found.predictors[predictor].null
        assert null.mean == pytest.approx(sum(skills) / 2, rel=1e-6, abs=1e-7)
        half = 12.706 * math.sqrt(1.5) * abs(skills[0] - skills[1]) / math.sqrt(2)  # Student's t with 1 degree
        assert null.high == pytest.approx(null.mean + half, rel=1e-4, abs=1e-6)


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


def test_jumps_of_a_run_folder_count_as_when_the_cut_was_reached(own_lora_run: LoraRun, tmp_path: Path) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    jump(own_lora_run, 2, 50, moved("t"))
    found = backtest(open_checkpoints(own_lora_run.path), ALONE, horizon=20, draws=0)
    assert found.cuts == (10, 20, 30, 40)
    for predictor, given in ALONE.items():
        at = lambda step: reopened(own_lora_run, tmp_path, step)  # noqa: E731
        assert not found.predictors[predictor].failures
        wanted = replayed(at, at, found.cuts, 20, predictor, given)
        assert_close(found.predictors[predictor].score, wanted, 1e-4)  # jumps are added to the checkpoints in fp32


# Known futures


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
    wanted = {
        "skill": 1 - 200**2 * 14 / DD,
        "rel_error": math.sqrt(200**2 * 14 / DD),
        "cosine": PD / math.sqrt(PP * DD),
        "norm_ratio": math.sqrt(PP / DD),
        "lambda": PD / PP,
        "damped_skill": PD**2 / PP / DD,
    }
    assert judged.score.as_dict() == pytest.approx(wanted, rel=1e-9)
    assert judged.by_cut[1] == pytest.approx(1 - 200**2 / D[1] ** 2, rel=1e-9)


@pytest.mark.parametrize("lora", [False, True])
def test_on_a_random_walk_nothing_beats_its_null_and_staying_is_zero(lora: bool) -> None:
    steps = tuple(range(10, 210, 10))
    source = lora_walks(4, (0, *steps)) if lora else walks(4, steps, m=30, n=20)
    found = backtest(source, ["secant"], horizon=20)
    stay, secant = found.predictors["stay"], found.predictors["secant"]
    assert (stay.score.skill, stay.interval, stay.null.mean, stay.null.high) == (0.0, (0.0, 0.0), 0.0, 0.0)
    assert stay.abstained == 1.0
    for judged in found.predictors.values():
        assert not judged.useful
        assert not judged.above_null
    for predictor in ("secant", "random", "ridge"):
        score = found.predictors[predictor].score
        assert score.skill < 0.05
        assert score.cosine == pytest.approx(0, abs=0.06)
    assert secant.score.best_lambda == pytest.approx(0, abs=0.06)
    assert secant.score.skill == pytest.approx(-1, abs=0.15)


def test_what_runs_elsewhere_can_be_sent_there(lora_run: LoraRun) -> None:
    source, key = open_checkpoints(lora_run.path), "model.layers.0.self_attn.q_proj.weight"
    measure = make_replay(source, source.steps, 10, 2, 2, 0)
    sent, here = pickle.loads(pickle.dumps(measure))(key), measure(key)
    assert all(torch.equal(sent[place], gram) for place, gram in here.items())


# What a predictor is shown


def test_a_predictor_that_looks_ahead_is_found_out() -> None:
    @matrix_predictor("prophet")
    def prophet(matrix: Any, horizon: int, config: Any) -> CoefficientUpdate:
        delta = matrix.history.source.delta(matrix.name, matrix.steps[-1] + horizon, matrix.steps[-1])
        return CoefficientUpdate({matrix.steps[-1]: float(delta.sum())})

    judged = judge(straight(), prophet)
    assert len(judged.failures) == 14
    assert "CheckpointError" in judged.failures[0].reason
    assert "step 20" in judged.failures[0].reason
    assert judged.score.skill == 0.0


# What a predictor answers


def test_predictors_are_names_classes_instances_mappings_and_references() -> None:
    secant = {"name": "secant", "window": 20}
    given = ["secant", Secant, Secant(window=20), secant, "next_predictors.secant:Secant"]
    found = backtest(straight(), given, horizon=10, draws=0).predictors
    assert len(found) == 3 + len(given)
    assert found["secant#3"].fields == found["secant#4"].fields == {"window": 20}
    assert found["secant"].fields == found["secant#2"].fields == {}
    assert {judged.acted for key, judged in found.items() if "ecant" in key} == {13, 14}
    with raises_kind("plugin-invalid", "42"):
        backtest(straight(), [42])


def test_what_goes_wrong_is_reported_and_ends_nothing() -> None:
    class Wrong(TrajectoryPredictor):
        name = "wrong"

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

    found = backtest(straight(), [Wrong, "secant"], horizon=10, draws=2)
    judged = found.predictors["wrong"]
    expected = {
        10: ("ZeroDivisionError", "by hand"),
        20: ("GuardError", name(0)),
        30: ("GuardError", name(0)),
        40: ("PluginError", name(0), "step 50"),
        50: ("PluginError", name(0), "(5, 7)", "(7, 5)"),
        60: ("PluginError", name(0), "str"),
        70: ("GuardError", "NoneType"),
        80: ("PluginError", "elsewhere"),
        90: ("GuardError", "step 10", "90"),
    }
    assert [failure.cut for failure in judged.failures] == list(expected)
    for failure in judged.failures:
        assert all(part in failure.reason for part in expected[failure.cut]), failure
    assert (judged.acted, judged.abstained) == (5, 0)
    assert judged.score.skill == pytest.approx(5 / 14)
    assert judged.acting.skill == pytest.approx(1)
    assert found.predictors["secant"].score.skill == pytest.approx(1)


@pytest.mark.parametrize("source", [walks(1), lora_walks(1)])
@pytest.mark.parametrize("size", [1e100, 1e200])
def test_a_jump_whose_square_is_beyond_float64_is_reported_and_counts_as_staying(
    source: CheckpointSource, size: float
) -> None:
    @matrix_predictor("far")
    def far(matrix: Any, horizon: int, config: Any) -> Any:
        (m, n), along = matrix.shape, CoefficientUpdate({matrix.steps[-1]: size})
        ones = torch.ones(m, 1, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)
        return along if matrix.steps[-1] % 20 else LowRankUpdate(LowRank(size * ones[0], ones[1]))

    judged = judge(source, far())
    assert len(judged.failures) == len(judged.by_cut) == 14
    assert all("GuardError" in failure.reason for failure in judged.failures)
    assert judged.score.skill == 0.0


def test_an_abstention_counts_as_staying_and_figures_of_the_other_cuts_are_separate() -> None:
    @matrix_predictor("sometimes")
    def sometimes(matrix: Any, horizon: int, config: Any) -> Any:
        newest = matrix.steps[-1]
        return Abstain("not at even tens") if newest % 20 == 0 else CoefficientUpdate({newest: horizon / newest})

    direction = noise(1, 7, 5)
    judged = judge(dense_run({"a": lambda t: t * direction}, FIFTEEN), sometimes, horizon=20)
    assert judged.acted == 7  # 10, 30, ... 130 of 10, 20, ... 130
    assert judged.abstained == pytest.approx(6 / 13)
    assert judged.reasons == {"not at even tens": 6}
    assert judged.acting.skill == pytest.approx(1, abs=1e-12)
    assert judged.score.skill == pytest.approx(7 / 13)
    assert judged.score.rel_error == pytest.approx(math.sqrt(6 / 13))
    assert judged.by_cut[1] == 0.0


def test_confidence_scales_what_is_predicted() -> None:
    @matrix_predictor("half")
    def half(matrix: Any, horizon: int, config: Any) -> Any:
        c = horizon / matrix.steps[-1]
        if matrix.name == name(1):
            return LowRankUpdate(LowRank(torch.full((7, 1), c), torch.ones(1, 5))), 0.5
        return CoefficientUpdate({matrix.steps[-1]: c}), 0.5

    judged = judge(dense_run({name(0): drift(1), name(1): lambda t: t * torch.ones(7, 5).double() / 10}), half)
    score, _ = judged.per_matrix[name(0)]
    assert score.skill == pytest.approx(0.75)
    assert score.best_lambda == pytest.approx(2)
    ratios = [0.5 * 10 / t for t in range(10, 100, 10)]
    score, _ = judged.per_matrix[name(1)]
    assert score.norm_ratio == pytest.approx(math.sqrt(sum(r * r for r in ratios) / len(ratios)), rel=1e-6)


# Figures and settings


def test_what_points_backwards_gains_nothing_by_damping() -> None:
    backwards = Score.of(torch.tensor([4.0, -1.0, 1.0]))
    assert (backwards.skill, backwards.best_lambda, backwards.cosine) == (-6.0, -0.25, -0.5)
    assert backwards.damped_skill == 0.0
    assert Score.of(torch.zeros(3)) == Score()
    assert Score.of(torch.tensor([0.0, 0.0, 2.0])) == Score(0.0, 1.0, None, 0.0, None, 0.0)


def test_the_null_says_where_the_run_is_among_its_walks() -> None:
    # Skills 2 PD - PP, as DD is 1: 0.75 of the run, then -2, 0, 0.75 and -4 of four walks.
    sums = torch.tensor([[0.25, 0.5, 1.0], [2.0, 0.0, 1.0], [1.0, 0.5, 1.0], [0.25, 0.5, 1.0], [4.0, 0.0, 1.0]])
    null = WalkNull.of(sums.double())
    assert (null.mean, null.p) == (pytest.approx(-1.3125), pytest.approx(2 / 5))
    assert null.z == pytest.approx((0.75 + 1.3125) / torch.tensor([-2, 0, 0.75, -4]).double().std().item())
    assert WalkNull.of(sums[:2].double()) is None


def test_the_same_seed_gives_the_same_answer_and_another_one_another_interval() -> None:
    def answer(seed: int) -> dict[str, Any]:
        found = backtest(RUNS["dense"](), ["secant"], horizon=20, draws=3, seed=seed).as_dict()
        found.pop("shared_seconds")
        for judged in found["predictors"].values():
            judged.pop("seconds")
        return found

    first, again, other = answer(0), answer(0), answer(1)
    assert first == again
    for key in ("skill_low", "null_skill"):
        assert first["predictors"]["secant"][key] != other["predictors"]["secant"][key]
    assert first["predictors"]["secant"]["skill"] == other["predictors"]["secant"]["skill"]


def test_the_interval_is_that_of_resampled_blocks() -> None:
    # Errors good and bad in runs of four. The mean of 160 single cuts has sd .5 / sqrt(160) = .0395. Blocks of four
    # have means of .5, .75, 1, 1.25 and 1.5 with variance .09375: 40 of them have sd .0484.
    error = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5] * 20, dtype=torch.float64)
    sums = torch.stack([error, torch.full_like(error, 0.5), torch.ones_like(error)], 1)  # |P - D|^2 = error
    for block, sd in ((1, 0.0395), (4, 0.0484)):
        wanted = pytest.approx(-1.96 * sd, abs=0.008), pytest.approx(1.96 * sd, abs=0.008)
        assert skill_interval(sums, block, 0) == wanted
    assert skill_interval(sums[:7], 4, 0) is None
    assert skill_interval(sums[:8], 4, 0) is not None


def test_the_horizon_and_the_cuts_are_chosen_sensibly() -> None:
    assert default_horizon(FIFTEEN) == 20
    assert default_horizon((0, 5, 10, 15)) == 10
    assert default_horizon((10, 20)) == 10
    assert default_horizon((10, 20, 30, 45, 60, 75)) == 30
    inputs = make_replay(walks(1), FIFTEEN, None, 4, 0, 0)
    assert (inputs.horizon, inputs.cuts, inputs.block) == (20, (40, 70, 100, 130), 1)
    inputs = make_replay(walks(1), FIFTEEN, 50, None, 0, 0)
    assert (inputs.cuts, inputs.block) == (tuple(range(10, 110, 10)), 5)


@pytest.mark.parametrize(
    ("options", "kind", "names"),
    [
        ({"horizon": 0}, "config-invalid-value", ["horizon"]),
        ({"horizon": 15}, "config-invalid-value", ["15", "10, 20"]),
        ({"draws": 1}, "config-invalid-value", ["draws"]),
        ({"cuts": 0}, "config-invalid-value", ["cuts"]),
        ({"predictors": {"secant": {"windw": 5}}}, "config-unknown-key", ["windw", "'window'"]),
        ({"predictors": ["secnt"]}, "plugin-unknown", ["secnt", "'secant'"]),
    ],
)
def test_wrong_settings_are_refused_before_the_work(options: dict[str, Any], kind: str, names: list[str]) -> None:
    with raises_kind(kind, *names):
        backtest(straight(), **options)


def test_too_short_a_run_and_nan_in_a_checkpoint_are_refused() -> None:
    with raises_kind("checkpoint-too-few", "2 checkpoints"):
        backtest(straight((10,)))
    source = straight()
    source._checkpoints[50][name(0)] = torch.full((7, 5), torch.nan).double()
    with raises_kind("checkpoint-not-finite", name(0)):
        backtest(source, horizon=10)
