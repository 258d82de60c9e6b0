"""A backtest done by hand: whole matrices, and a run that ends at the cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core import History
from next_core.diagnostics.backtest_results import Score
from next_core.interfaces import CheckpointSource, CoefficientUpdate, Prediction
from next_core.interfaces.prediction import weight_delta
from next_core.interfaces.weight_delta import merged
from next_core.mathematics.low_rank import dense
from next_core.plugins import make_predictor
from next_core.sources.memory import MemorySource
from next_core.sources.replay import Signs
from next_core.types import LoraFactors
from tests.predictors.trajectories import (
    curve,
    curved_lora_run,
    dense_run,
    resolve_dense,
)

Fields = Mapping[str, Mapping[str, Any]]
ALONE: Fields = {
    "secant": {"window": 10},
    "rl-extra": {},
    "relex": {},
    "ridge": {},
    "alpharl": {"min_t": 0},
    "random": {"rank": 2},
}


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
        step = weight_delta(prediction, key, 1.0)
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
