"""The figures of an analysis, each with its random-walk null, for one matrix or for a group of matrices."""

from collections.abc import Mapping
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
        return self.figures[figure].value if figure in self.figures else None

    def as_dict(self) -> dict[str, Any]:
        figures = {name: figure.as_dict() for name, figure in self.figures.items()}
        series = {name: asdict(series) for name, series in self.series.items()}
        return {"matrices": len(self.members), "figures": figures} | ({"series": series} if series else {})
