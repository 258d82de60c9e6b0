"""What a backtest answers: each predictor's figures, their intervals, and the same figures on random walks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from next_core.diagnostics.random_walks import band
from next_core.drawing import Axis, Chart, Dot, Rows, drawn_or_error
from next_core.process.optional_packages import import_optional

RESAMPLES = 2000  # Bootstrap samples of an interval


@dataclass(frozen=True)
class Score:
    """Figures pooled over cuts and matrices, of the prediction P and what followed, D; None where a norm is zero.

    ``skill`` 1 - sum |P - D|^2 / sum |D|^2; ``rel_error`` the root of that quotient; ``cosine`` sum <P, D> /
    sqrt(sum |P|^2 sum |D|^2); ``norm_ratio`` sqrt(sum |P|^2 / sum |D|^2); ``best_lambda`` sum <P, D> / sum |P|^2, the
    damping that would have been best in hindsight; ``damped_skill`` the skill with it, 0 where it is negative.
    """

    skill: float | None = None
    rel_error: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    best_lambda: float | None = None
    damped_skill: float | None = None

    @classmethod
    def of(cls, sums: Tensor) -> Score:
        """Pool <P, P>, <P, D>, <D, D> over all dimensions but the last."""
        PP, PD, DD = sums.reshape(-1, 3).sum(0).tolist()
        if not DD > 0:
            return cls()
        error = max(PP - 2 * PD + DD, 0.0)
        skill, rel_error, ratio = 1 - error / DD, math.sqrt(error / DD), math.sqrt(max(PP, 0.0) / DD)
        if not PP > 0:
            return cls(skill, rel_error, None, ratio, None, 0.0)
        return cls(skill, rel_error, PD / math.sqrt(PP * DD), ratio, PD / PP, max(PD, 0.0) ** 2 / (PP * DD))

    def as_dict(self) -> dict[str, Any]:
        return {"lambda" if name == "best_lambda" else name: value for name, value in vars(self).items()}


@dataclass(frozen=True)
class WalkNull:
    """The skill on random walks: mean, 95% interval, and where the run's own skill is among them.

    ``p`` is (1 + walks at least as good) / (1 + walks), which cannot be small with few walks; ``z`` counts standard
    deviations of the walks, None where they do not differ.
    """

    mean: float
    low: float
    high: float
    p: float
    z: float | None

    @classmethod
    def of(cls, sums: Tensor) -> WalkNull | None:
        """Take what ``Score.of`` pools, with a leading dimension: the run itself, then its walks."""
        skill, *walks = (Score.of(one).skill for one in sums)
        drawn = torch.tensor([one for one in walks if one is not None], dtype=torch.float64)
        if skill is None or len(drawn) < 2:
            return None
        mean, low, high = map(float, band(drawn))
        spread = float(drawn.std())
        p = (1 + int((drawn >= skill).sum())) / (1 + len(drawn))
        return cls(mean, low, high, p, (skill - mean) / spread if spread > 0 else None)


class Failure(NamedTuple):
    """A cut at which a predictor raised or returned something unusable; it counts as staying there."""

    cut: int
    reason: str


@dataclass(frozen=True)
class Judged:
    """One predictor. Where it abstained or failed it counts as staying put, except in ``acting``.

    ``acting``: over the ``acted`` cuts at which it moved anything. ``interval``: 95%, of the skill; None with too few
    cuts. ``abstained``: the share of cuts, and ``reasons`` their number by reason. ``seconds``: of fit and predict over
    all cuts of the run itself, after deltas were decomposed. ``by_cut``: the skill of each cut.
    """

    name: str
    fields: Mapping[str, Any]
    score: Score
    interval: tuple[float, float] | None
    null: WalkNull | None
    acting: Score
    acted: int
    abstained: float
    seconds: float
    by_cut: Sequence[float | None]
    per_matrix: Mapping[str, tuple[Score, WalkNull | None]] = field(repr=False)
    failures: Sequence[Failure] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def above_null(self) -> bool:
        """Whether the skill is above the 95% interval of random walks."""
        return self.score.skill is not None and self.null is not None and self.score.skill > self.null.high

    @property
    def useful(self) -> bool:
        """Whether it beats both random walks and, with its whole interval, staying put."""
        return self.above_null and self.interval is not None and self.interval[0] > 0

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {
            **_figures(self.score, self.null),
            "skill_low": low,
            "skill_high": high,
            "above_null": self.above_null,
            "useful": self.useful,
            "fields": dict(self.fields),
            "abstained": self.abstained,
            "reasons": dict(self.reasons),
            "acted": self.acted,
            "acting": self.acting.as_dict(),
            "seconds": self.seconds,
            "skill_by_cut": list(self.by_cut),
            "per_matrix": {name: _figures(*one) for name, one in self.per_matrix.items()},
            "failures": [failure._asdict() for failure in self.failures],
        }


@dataclass(frozen=True, repr=False)
class Backtest:
    """All predictors on one run, the best first. ``shared_seconds``: what they share, the run and its walks."""

    horizon: int
    cuts: tuple[int, ...]
    block: int
    draws: int
    seed: int
    matrices: int
    predictors: Mapping[str, Judged]
    shared_seconds: float
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain objects with the keys that docs/backtest.md lists."""
        predictors = {name: judged.as_dict() for name, judged in self.predictors.items()}
        return {**vars(self), "cuts": list(self.cuts), "notes": list(self.notes), "predictors": predictors}

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, one row per predictor, the best first: skill, its interval and its null."""
        rows = {
            name: {key: value for key, value in judged.as_dict().items() if isinstance(value, float | int | None)}
            for name, judged in self.predictors.items()
        }
        return import_optional("pandas", "notebook").DataFrame.from_dict(rows, orient="index").rename_axis("predictor")

    def plot(self) -> Chart:
        """Draw each predictor's skill with its 95% interval, and the 95% interval of random walks in grey.

        Raises ``ConfigError`` where nothing moved.
        """
        known = {name: one for name, one in self.predictors.items() if one.score.skill is not None}
        rows = {name: [Dot(one.score.skill or 0.0, one.interval)] for name, one in known.items()}
        walks = {name: (one.null.low, one.null.mean, one.null.high) for name, one in known.items() if one.null}
        axis = Axis(f"skill {self.horizon} steps ahead: 1 exact, 0 no jump; grey: walks")
        none = "no predictor has a skill: nothing moved"
        return drawn_or_error(Rows("backtest", rows, axis, walks) if rows else none)

    def __repr__(self) -> str:
        skills = ", ".join(f"{n} {j.score.skill:.2f}" for n, j in self.predictors.items() if j.score.skill is not None)
        return f"<Backtest over {len(self.cuts)} cuts, horizon {self.horizon}; skill: {skills}>"

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(float_format="%.3g"))


def _figures(score: Score, null: WalkNull | None) -> dict[str, Any]:
    names = {"null_skill": "mean", "null_low": "low", "null_high": "high", "p": "p", "z": "z"}
    return score.as_dict() | {key: getattr(null, name, None) for key, name in names.items()}


def skill_interval(sums: Tensor, block: int, seed: int) -> tuple[float, float] | None:
    """Return the 95% interval of the pooled skill under a circular block bootstrap over cuts (Politis and Romano 1992).

    ``sums`` (cuts, 3) are <P, P>, <P, D>, <D, D>. Blocks of ``block`` neighbouring cuts are drawn, because these look
    at overlapping motion. None with fewer cuts than two blocks.
    """
    cuts = len(sums)
    if cuts < max(2, 2 * block):
        return None
    error, motion = (sums @ torch.tensor(weights, dtype=sums.dtype) for weights in ([1.0, -2.0, 1.0], [0.0, 0.0, 1.0]))
    random = np.random.default_rng(seed)
    starts = random.integers(0, cuts, (RESAMPLES, -(-cuts // block)))
    chosen = ((starts[..., None] + np.arange(block)) % cuts).reshape(RESAMPLES, -1)[:, :cuts]
    where = torch.from_numpy(chosen)
    below = motion[where].sum(-1)
    skills = (1 - error[where].sum(-1) / below)[below > 0]
    if not len(skills):
        return None
    low, high = skills.quantile(torch.tensor([0.025, 0.975], dtype=skills.dtype)).tolist()
    return low, high
