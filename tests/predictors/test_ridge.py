"""The ridge regression from Gram matrices equals the one on the deltas themselves."""

import functools

import pytest
import torch
from sklearn.linear_model import Ridge

from next_core.mathematics.low_rank import LowRank
from next_core.plugins import make_predictor
from next_core.sources.memory import MemorySource
from tests.errors import raises_kind
from tests.predictors.trajectories import curve, curved_lora_run, dense_run, drift, predicted_by, resolve_dense

HORIZON = 30


predict = functools.partial(predicted_by, "ridge")


def flat(source: MemorySource, step: int, since: int | None = None) -> torch.Tensor:
    delta = source.delta("a", step, since)
    return (delta.dense() if isinstance(delta, LowRank) else delta).flatten()


@pytest.mark.parametrize("alpha_ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize(
    "inputs", [{}, {"use_global": False}, {"use_local": False}], ids=["both", "local only", "global only"]
)
@pytest.mark.parametrize("lora", [False, True], ids=["dense", "lora"])
def test_equals_scikit_learn_on_the_deltas_themselves(alpha_ridge: float, inputs: dict[str, bool], lora: bool) -> None:
    steps = tuple(range(10, 110, 10))
    source = curved_lora_run(steps) if lora else dense_run({"a": curve(1)})
    before = dict(zip(steps, (None, *steps), strict=False))
    starts = [t for t in steps if t + HORIZON in steps]
    kinds = [use for use in ("use_global", "use_local") if inputs.get(use, True)]

    def columns(at: list[int]) -> torch.Tensor:
        made = {
            "use_global": torch.cat([flat(source, t) for t in at]),
            "use_local": torch.cat([flat(source, t, before[t]) for t in at]),
        }
        return torch.stack([made[kind] for kind in kinds], -1)

    X = columns(starts)
    y = torch.cat([flat(source, t + HORIZON, t) for t in starts])
    scale = X.norm(dim=0)
    model = Ridge(alpha=alpha_ridge, fit_intercept=False).fit(X / scale, y)
    wanted = torch.from_numpy(model.predict(columns([100]) / scale)).reshape(7, 5)
    found = resolve_dense(predict(source, alpha_ridge=alpha_ridge, **inputs), "a")
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


def test_the_penalty_draws_towards_no_motion() -> None:
    source = dense_run({"a": drift(1)})
    penalties = (0.0, 0.1, 1.0, 1e6)
    sizes = [resolve_dense(predict(source, alpha_ridge=p, use_global=False), "a").norm() for p in penalties]
    # One input: the penalty p divides its coefficient by 1 + p.
    assert [float(sizes[0] / size) for size in sizes] == pytest.approx([1.0, 1.1, 2.0, 1e6 + 1])


def test_velocity_is_per_step_where_checkpoints_are_not_evenly_spaced() -> None:
    source = dense_run({"a": drift(1)}, steps=(20, 25, 40, 60, 80, 85, 100))
    found = predict(source, 20, alpha_ridge=1e-12, use_global=False)
    torch.testing.assert_close(resolve_dense(found, "a"), drift(1)(20))


@pytest.mark.parametrize(
    ("steps", "horizon", "figures"),
    [
        ([10, 20, 30], 50, ("3 checkpoints", "10, 20")),
        ([0, 50], 50, ("1 checkpoints",)),
        ([20, 25, 40, 60, 80], 30, ("20, 40, 55, 60",)),
    ],
)
def test_abstains_while_no_target_was_observed(steps: list[int], horizon: int, figures: tuple[str, ...]) -> None:
    prediction = predict(dense_run({"a": drift(1)}, steps=steps), horizon)
    assert all(figure in (prediction.abstention or "") for figure in (f"{horizon} steps apart", *figures))
    assert not prediction.updates


def test_a_matrix_that_only_began_to_move_has_nothing_to_learn_from() -> None:
    def late(t: int) -> torch.Tensor:
        return drift(1)(max(t - 90, 0))

    prediction = predict(dense_run({"a": drift(1), "late": late}))
    assert set(prediction.abstained) == {"late"}
    assert set(prediction.updates) == {"a"}


def test_refuses_to_regress_on_nothing() -> None:
    with raises_kind("config-contradiction", "use_global", "use_local"):
        make_predictor("ridge", use_global=False, use_local=False)
