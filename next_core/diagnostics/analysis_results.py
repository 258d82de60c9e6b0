"""What an analysis answers: figures beside their nulls, as frozen values and as plain objects for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Numbers = tuple[float | None, ...]


class Described(NamedTuple):
    """How a figure is called: a heading for tables, and in words."""

    heading: str
    words: str


FIGURES: Mapping[str, Described] = {
    "squared_energy_ratio_global": Described("s1²/Σs² global", "of the newest global delta"),
    "squared_energy_ratio_local": Described("s1²/Σs² local", "of local deltas, median over time"),
    "energy_ratio_global": Described("s1/Σs global", "of the newest global delta, as in NExt"),
    "energy_ratio_local": Described("s1/Σs local", "of local deltas, median over time"),
    "c1_r2": Described("R2(c1~t) in sample", "leading time component on a line in t"),
    "top_1_share": Described("time top-1/all", "share of the leading time component"),
    "top_5_share": Described("time top-5/all", "share of the five leading ones"),
    "top_1_of_top_5": Described("time top-1/top-5", "the leading one's share of the first five"),
    "line_r2": Described("R2(W~t) in sample", "all points on one line in t"),
    "line_skill": Described("skill, line", "out of sample; fitted line against staying put"),
    "pinned_skill": Described("skill, pinned", "out of sample; its slope from the newest point on"),
    "line_r2_out": Described("R2 out of sample", "fitted line against the mean of the targets"),
    "cosine_local": Described("cos local", "successive local deltas, median over time"),
    "agreement": Described("agreement, lambda", "of two successive motions, median over time"),
    "cosine_u_global": Described("|cos u| global", "leading left vectors of successive global deltas"),
    "cosine_v_global": Described("|cos v| global", "leading right vectors of successive global deltas"),
    "cosine_u_local": Described("|cos u| local", "leading left vectors of successive local deltas"),
    "cosine_v_local": Described("|cos v| local", "leading right vectors of successive local deltas"),
    "msd_exponent": Described("MSD exponent", "1: random walk, 2: straight line"),
    "straightness": Described("net / path", "net displacement over the path's length"),
    "speed_ratio": Described("speed, late/early", "norm per RL step, last third over first"),
}


def number(value: float) -> str:
    """Three decimals below 1, fewer above: -0.012, 1.89, -26.5, 310."""
    digits = next((digits for bound, digits in ((1, 3), (10, 2), (100, 1)) if abs(value) < bound), 0)
    return f"{round(value, digits) + 0.0:.{digits}f}"  # not -0.000


@dataclass(frozen=True)
class Null:
    """A figure under the random walk: its mean and 95% interval; None where there is none at this place."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One figure of a group: its median over the matrices that have it, quartiles, and its null.

    ``outside`` is where the value lies against the null's interval; None without a null, or inside.
    """

    value: float | None
    quartiles: tuple[float, float] | None = None
    matrices: int = 0
    null: Null | None = None

    @property
    def outside(self) -> Literal["above", "below"] | None:
        if self.value is None or self.null is None:
            return None
        return "above" if self.value > self.null.high else "below" if self.value < self.null.low else None

    def as_dict(self) -> dict[str, Any]:
        null = None if self.null is None else vars(self.null)
        return {
            "value": self.value,
            "quartiles": None if self.quartiles is None else list(self.quartiles),
            "matrices": self.matrices,
            "null": null,
            "outside": self.outside,
        }


@dataclass(frozen=True)
class Series:
    """A figure over steps, horizons or lags: median over matrices, quartiles, and (overall only) its null."""

    over: Literal["step", "horizon", "lag"]
    x: tuple[int, ...]
    value: Numbers
    low: Numbers
    high: Numbers
    null: tuple[Null | None, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        null = None if self.null is None else [None if one is None else vars(one) for one in self.null]
        return {"over": self.over, "x": self.x, "value": self.value, "low": self.low, "high": self.high, "null": null}


@dataclass(frozen=True)
class Group:
    """Some matrices: one, those of a layer or a kind, or all. ``layer`` and ``kind`` are set for one matrix."""

    members: tuple[str, ...]
    figures: Mapping[str, Figure]
    series: Mapping[str, Series] = field(default_factory=dict)
    layer: int | None = None
    kind: str | None = None

    def value(self, figure: str) -> float | None:
        """The figure, or None."""
        return self.figures[figure].value if figure in self.figures else None

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "matrices": len(self.members),
            "figures": {name: figure.as_dict() for name, figure in self.figures.items()},
        }
        if self.series:
            found["series"] = {name: series.as_dict() for name, series in self.series.items()}
        return found


@dataclass(frozen=True)
class Precision:
    """How large deltas of half-precision checkpoints are beside the rounding step, per matrix over one interval."""

    step: int
    since: int
    delta_to_ulp: Mapping[str, float]
    drowned: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "since": self.since,
            "delta_to_ulp": dict(self.delta_to_ulp),
            "drowned": list(self.drowned),
        }


@dataclass(frozen=True)
class LearningRate:
    """How many times too small a run's learning rate looks: about ``factor``, between ``low`` and ``high``.

    It follows from ``agreement``: lambda of successive motions of ``span`` RL steps, the median over matrices, and of
    that the median over ``moments`` in time (``quartiles`` over time). 1: it does not look too small. Where ``auto``
    was at work, its median ``multiple`` is in the factor. ``jumps``: how many were made, by whichever predictor.
    ``reason`` says why nothing can be told.
    """

    agreement: float | None = None
    quartiles: tuple[float, float] | None = None
    null: Null | None = None
    factor: float | None = None
    low: float | None = None
    high: float | None = None
    span: int | None = None
    moments: int = 0
    multiple: float | None = None
    jumps: int = 0
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "factor": self.factor,
            "low": self.low,
            "high": self.high,
            "agreement": self.agreement,
            "quartiles": None if self.quartiles is None else list(self.quartiles),
            "null": None if self.null is None else vars(self.null),
            "span": self.span,
            "moments": self.moments,
            "multiple": self.multiple,
            "jumps": self.jumps,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Analysis:
    """The geometry of a run. ``whole`` takes all matrices as one vector; ``missing`` says why a figure is not there."""

    steps: tuple[int, ...]
    origin: int
    even: bool
    horizon: int | None
    draws: int
    seed: int
    overall: Group
    whole: Group
    layers: Mapping[int, Group]
    kinds: Mapping[str, Group]
    matrices: Mapping[str, Group]
    frozen: Mapping[str, str]
    skipped: Mapping[str, str]
    missing: Mapping[str, str]
    learning_rate: LearningRate = LearningRate()
    notes: Sequence[str] = ()
    precision: Precision | None = None
    advice: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain objects with the keys that docs/analyze.md lists; no number is NaN or infinite."""
        return {
            "steps": list(self.steps),
            "origin": self.origin,
            "evenly_spaced": self.even,
            "horizon": self.horizon,
            "draws": self.draws,
            "seed": self.seed,
            "overall": self.overall.as_dict(),
            "whole": self.whole.as_dict(),
            "layers": {str(layer): group.as_dict() for layer, group in self.layers.items()},
            "kinds": {kind: group.as_dict() for kind, group in self.kinds.items()},
            "per_matrix": {
                name: {"layer": group.layer, "kind": group.kind} | group.as_dict()
                for name, group in self.matrices.items()
            },
            "frozen": dict(self.frozen),
            "skipped": dict(self.skipped),
            "missing": dict(self.missing),
            "learning_rate": self.learning_rate.as_dict(),
            "notes": list(self.notes),
            "precision": None if self.precision is None else self.precision.as_dict(),
            "advice": list(self.advice),
        }
