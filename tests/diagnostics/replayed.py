"""A backtest done by hand: whole matrices, and a run that ends at the cut."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core import History
from next_core.diagnostics.backtest_results import Score
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import dense
from next_core.plugins import make_predictor
from next_core.sources.memory import MemorySource
from next_core.sources.source_views import RandomWalk
from next_core.types import LoraFactors
from tests.predictors.trajectories import curve, curved_lora_run, dense_run

ALONE: Mapping[str, Mapping[str, Any]] = {
    "secant": {"window": 10},
    "rl-extra": {},
    "relex": {},
    "ridge": {},
    "alpharl": {"min_t": 0},
    "random": {"rank": 2},
}
RUNS: dict[str, Callable[[], MemorySource]] = {
    "dense": lambda: dense_run({"a": curve(1), "b": curve(40, 4, 9)}),
    "lora": curved_lora_run,
    "lora without step 0": lambda: curved_lora_run(tuple(range(10, 110, 10))),
}


def replayed(
    seen: Callable[[int], CheckpointSource],
    after: Callable[[int], CheckpointSource],
    cuts: tuple[int, ...],
    horizon: int,
    predictor: str,
    fields: Mapping[str, Any],
) -> Score:
    """The pooled figures, from a run that has nothing after each cut, and the motion that followed, all dense."""
    found, wanted = [], []
    for cut in cuts:
        past, future = seen(cut), after(cut + horizon)
        prediction = make_predictor(predictor, **fields).fit(History(past)).predict(horizon)
        for parameter in past.parameters:
            found.append(dense(prediction.delta(parameter.name)).double().flatten())
            wanted.append(dense(future.delta(parameter.name, cut + horizon, cut)).double().flatten())
    P, D = torch.cat(found), torch.cat(wanted)
    return Score.of(torch.stack([P @ P, P @ D, D @ D]))


def until(source: MemorySource, step: int) -> MemorySource:
    """A run of its own that ends at a step."""
    kept = {t: value for t, value in source._checkpoints.items() if t <= step}
    return MemorySource(kept, source._backbone, source._metrics)


def walked(source: MemorySource, seed: int, draw: int) -> MemorySource:
    """The run with its increments signed, built checkpoint by checkpoint."""
    made = {step: dict(values) for step, values in source._checkpoints.items()}
    for parameter in source.parameters:
        signs = RandomWalk(source, seed, draw).signs(parameter.name)
        values = {step: source._value(parameter.name, step) for step in source.steps}
        now: Any = values[source.steps[0]]
        if isinstance(now, Tensor):
            first = source._backbone[parameter.name]
            now = first + signs[source.steps[0]] * (now - first)
        elif 0 not in signs and 0 not in source.steps:
            now = LoraFactors(now.A, signs[source.steps[0]] * now.B, now.scaling)
        made[source.steps[0]][parameter.name] = now
        for before, after in itertools.pairwise(source.steps):
            old, new, sign = values[before], values[after], signs[after]
            if isinstance(old, LoraFactors) and isinstance(new, LoraFactors):
                now = LoraFactors(now.A + sign * (new.A - old.A), now.B + sign * (new.B - old.B), new.scaling)
            else:
                now = now + sign * (new - old)
            made[after][parameter.name] = now
    return MemorySource(made, source._backbone, source._metrics)


def assert_close(found: Score, wanted: Score, tolerance: float = 1e-7) -> None:
    expected = {
        key: None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)
        for key, value in wanted.as_dict().items()
    }
    assert found.as_dict() == expected
