"""What the checks of a predictor need: fresh ones of its settings, tiny runs, and predictions made comparable."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.history.history import History
from next_core.interfaces import CheckpointSource, Compressor, Prediction
from next_core.interfaces.prediction import merged, weight_deltas
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank, dense
from next_core.predictor import TrajectoryPredictor
from next_core.run_config import Schedule
from next_core.settings import Settings
from next_core.testing.check_runner import CheckError, expect
from next_core.testing.synthetic_runs import SHAPES, SyntheticRun, dense_run, lora_run
from next_core.types import Span

TOLERANCE = 1e-3
"""Relative error that rounding may come to where a run is only written differently: networks train in fp32."""


class PredictorCase:
    """A predictor's class and settings. The runs are on the schedule that it is made for."""

    def __init__(self, predictor: type[TrajectoryPredictor] | TrajectoryPredictor) -> None:
        self.plugin = predictor() if isinstance(predictor, type) else predictor
        self.cls: type[TrajectoryPredictor] = type(self.plugin)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Where the predictor says nothing, it is the engine's own."""
        return Schedule.model_validate(dict(self.cls.recommended.get("schedule", {})))

    @property
    def horizon(self) -> int:
        return self.schedule.horizon

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints before the first jump of the schedule."""
        return tuple(range(self.schedule.every, self.schedule.observe + 1, self.schedule.every))

    def make(self, **changes: Any) -> TrajectoryPredictor:
        """A fresh one, with some settings changed."""
        config: Settings = self.plugin.config
        if changes:
            config = type(config).model_validate(config.model_dump() | changes)
        return self.cls(config)

    def variants(self) -> Iterator[tuple[str, TrajectoryPredictor]]:
        """A fresh one in words; of one that has the setting ``space``, one for each."""
        if "space" not in type(self.plugin.config).model_fields:
            yield "", self.make()
            return
        for space in ("factors", "merged"):
            yield f" with space: {space}", self.make(space=space)

    def lora(self, **changes: Any) -> SyntheticRun:
        return lora_run(self.steps, **changes)

    def dense(self, **changes: Any) -> SyntheticRun:
        return dense_run(self.steps, **changes)

    def runs(self) -> Iterator[tuple[str, SyntheticRun]]:
        """Both kinds of run, in words."""
        yield "a LoRA run", self.lora()
        yield "a full-parameter run", self.dense()


def history(source: CheckpointSource, rank: int = 1, compressor: Compressor | None = None) -> History:
    """A history whose triplets are exact, so that nothing but the predictor decides what comes out."""
    return History(source, rank, compressor or ExactCompressor())


def predict(
    predictor: TrajectoryPredictor,
    source: CheckpointSource,
    horizon: int,
    rank: int = 1,
    compressor: Compressor | None = None,
) -> Prediction:
    return checked(predictor.fit(history(source, rank, compressor)).predict(horizon))


def checked(prediction: Any) -> Prediction:
    """The answer of ``predict``, which has to be a ``Prediction``."""
    expect(isinstance(prediction, Prediction), "predict answers with a Prediction", type(prediction).__name__)
    made: Prediction = prediction
    return made


def moved(prediction: Prediction) -> dict[str, Tensor]:
    """By how much each matrix moves at alpha 1, dense (m, n), confidence included; those that stay are left out."""
    found = {name: dense(merged(by)).double() for name, by in weight_deltas(prediction, 1.0)}
    return {name: by for name, by in found.items() if bool(by.any())}


def expect_same(before: Prediction, after: Prediction, when: str, exactly: bool = False) -> None:
    """Raise ``CheckError`` unless two predictions move the same matrices by the same, bit for bit if ``exactly``."""
    if (before.abstention is None) != (after.abstention is None):
        raise CheckError(f"the same prediction {when}", f"abstention {before.abstention!r}, then {after.abstention!r}")
    first, second = moved(before), moved(after)
    if set(first) != set(second):
        raise CheckError(f"the same matrices move {when}", f"{sorted(first)}, then {sorted(second)}")
    for name, was in first.items():
        error = float((second[name] - was).norm() / was.norm())
        if not (torch.equal(was, second[name]) if exactly else error <= TOLERANCE):
            wanted = "bit for bit" if exactly else f"to a relative error of {TOLERANCE:g}"
            raise CheckError(
                f"the same weight_delta {when}, {wanted}", f"'{name}' differs by {error:.2g} of its length"
            )


class TurnedSigns(ExactCompressor):
    """An SVD whose common signs of u and v are arbitrary, as LAPACK's are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        return self._turned(super().compress(deltas, rank))

    def compress_trajectory(
        self, path: LoraTrajectory, spans: Sequence[Span], rank: int, spectrum: bool = False
    ) -> Factors:
        return self._turned(super().compress_trajectory(path, spans, rank, spectrum))

    def _turned(self, factors: Factors) -> Factors:
        return factors.flip(1 - 2 * torch.randint(0, 2, factors.S.shape, generator=self._random))


@contextlib.contextmanager
def unchanged(what: str, read: Callable[[], object], same: Callable[[Any, Any], bool]) -> Iterator[None]:
    """Raise ``CheckError`` where what ``read`` gives is another thing afterwards."""
    before = read()
    yield
    after = read()
    expect(same(before, after), f"{what} as before", "it was changed")


NAMES = tuple(SHAPES)
