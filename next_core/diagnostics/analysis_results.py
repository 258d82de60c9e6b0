"""What an analysis finds: figures with their nulls, as frozen values and as plain objects for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Numbers = tuple[float | None, ...]


class Described(NamedTuple):
    """A figure's heading in tables, and what it is in words."""

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
    """A figure under the random walk: its mean and 95% interval; None in place of it where there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One figure of a group: its median over the matrices that have it, quartiles, and its null."""

    value: float | None
    quartiles: tuple[float, float] | None = None
    matrices: int = 0
    null: Null | None = None

    @property
    def outside(self) -> Literal["above", "below"] | None:
        """Where the value is against the null's interval; None without a null, or inside."""
        if self.value is None or self.null is None:
            return None
        return "above" if self.value > self.null.high else "below" if self.value < self.null.low else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outside": self.outside}


@dataclass(frozen=True)
class Series:
    """A figure over steps, horizons or lags: median over matrices, quartiles, and (overall only) its null."""

    over: Literal["step", "horizon", "lag"]
    x: tuple[int, ...]
    value: Numbers
    low: Numbers
    high: Numbers
    null: tuple[Null | None, ...] | None = None


@dataclass(frozen=True)
class Group:
    """Some matrices: one, those of a layer or a kind, or all. ``layer`` and ``kind`` are set for one matrix."""

    members: tuple[str, ...]
    figures: Mapping[str, Figure]
    series: Mapping[str, Series] = field(default_factory=dict)
    layer: int | None = None
    kind: str | None = None

    def value(self, figure: str) -> float | None:
        """Return the figure, or None."""
        return self.figures[figure].value if figure in self.figures else None

    def as_dict(self) -> dict[str, Any]:
        figures = {name: figure.as_dict() for name, figure in self.figures.items()}
        series = {name: asdict(series) for name, series in self.series.items()}
        return {"matrices": len(self.members), "figures": figures} | ({"series": series} if series else {})


@dataclass(frozen=True)
class Precision:
    """How large deltas of half-precision checkpoints are next to the rounding step, per matrix over one interval."""

    step: int
    since: int
    delta_to_ulp: Mapping[str, float]
    drowned: tuple[str, ...]


@dataclass(frozen=True)
class LearningRate:
    """How many times too small a run's learning rate looks: about ``factor``, between ``low`` and ``high``; 1 is fine.

    It follows from ``agreement``: lambda of successive motions of ``span`` RL steps, the median over matrices, and of
    that the median over ``moments`` in time (``quartiles`` over time). Where ``auto`` was at work, its median
    ``multiple`` is in the factor. ``jumps``: how many were made, by any predictor. ``reason``: why there is no figure.
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
        """Return plain objects for JSON; no number is NaN or infinite."""
        each = {n: {"layer": one.layer, "kind": one.kind} | one.as_dict() for n, one in self.matrices.items()}
        found = {
            **vars(self),
            "evenly_spaced": self.even,
            "overall": self.overall.as_dict(),
            "whole": self.whole.as_dict(),
            "layers": {str(layer): group.as_dict() for layer, group in self.layers.items()},
            "kinds": {kind: group.as_dict() for kind, group in self.kinds.items()},
            "per_matrix": each,
            "learning_rate": asdict(self.learning_rate),
            "precision": None if self.precision is None else asdict(self.precision),
        }
        return {key: value for key, value in found.items() if key not in ("even", "matrices")}
