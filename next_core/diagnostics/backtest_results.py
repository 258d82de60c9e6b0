"""What a backtest answers: each predictor's figures, their intervals, and the same figures of random walks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from next_core.diagnostics.nulls import band

RESAMPLES = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Score:
    """Pooled over cuts (and matrices), P what was predicted and D what followed; None where a norm is zero.

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
        """From sums of <P, P>, <P, D>, <D, D> over all dimensions but the last."""
        PP, PD, DD = sums.reshape(-1, 3).sum(0).tolist()
        if not DD > 0:
            return cls()
        error = max(PP - 2 * PD + DD, 0.0)
        skill, rel_error, ratio = 1 - error / DD, math.sqrt(error / DD), math.sqrt(max(PP, 0.0) / DD)
        if not PP > 0:
            return cls(skill, rel_error, None, ratio, None, 0.0)
        return cls(skill, rel_error, PD / math.sqrt(PP * DD), ratio, PD / PP, max(PD, 0.0) ** 2 / (PP * DD))

    def as_dict(self) -> dict[str, Any]:
        return {
            "skill": self.skill,
            "rel_error": self.rel_error,
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "lambda": self.best_lambda,
            "damped_skill": self.damped_skill,
        }


@dataclass(frozen=True)
class WalkNull:
    """The skill on random walks: mean, 95% interval, and where the run's own skill lies among them.

    ``p`` is (1 + walks at least as good) / (1 + walks), which few walks keep from being small; ``z`` is in standard
    deviations of the walks, None where they do not differ.
    """

    mean: float
    low: float
    high: float
    p: float
    z: float | None

    @classmethod
    def of(cls, skill: float | None, walks: Sequence[float | None]) -> WalkNull | None:
        drawn = torch.tensor([one for one in walks if one is not None], dtype=torch.float64)
        if skill is None or len(drawn) < 2:
            return None
        [mean], [low], [high] = (x.tolist() for x in band(drawn[:, None]))
        spread = float(drawn.std())
        p = (1 + int((drawn >= skill).sum())) / (1 + len(drawn))
        return cls(mean, low, high, p, (skill - mean) / spread if spread > 0 else None)

    def as_dict(self) -> dict[str, Any]:
        return {"null_skill": self.mean, "null_low": self.low, "null_high": self.high, "p": self.p, "z": self.z}


NO_NULL = {"null_skill": None, "null_low": None, "null_high": None, "p": None, "z": None}


@dataclass(frozen=True)
class Failure:
    """A cut at which a predictor raised or answered what cannot be used; it counts as staying there."""

    cut: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"cut": self.cut, "reason": self.reason}


@dataclass(frozen=True)
class Judged:
    """One predictor. Where it abstained or failed it counts as staying put, except in ``acting``.

    ``acting``: over the ``acted`` cuts at which it moved anything. ``interval``: 95%, of the skill; None with too few
    cuts. ``seconds``: of fit and predict over all cuts of the run itself, deltas decomposed beforehand. ``by_cut``: the
    skill of each cut.
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
    per_matrix: Mapping[str, tuple[Score, WalkNull | None]]
    failures: Sequence[Failure] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why it abstained, and at how many cuts."""

    @property
    def above_null(self) -> bool:
        """Whether the skill lies above the 95% interval of random walks."""
        return self.score.skill is not None and self.null is not None and self.score.skill > self.null.high

    @property
    def useful(self) -> bool:
        """Whether it beats both random walks and, with its whole interval, staying put."""
        return self.above_null and self.interval is not None and self.interval[0] > 0

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {
            **self.score.as_dict(),
            "skill_low": low,
            "skill_high": high,
            **(NO_NULL if self.null is None else self.null.as_dict()),
            "above_null": self.above_null,
            "useful": self.useful,
            "fields": dict(self.fields),
            "abstained": self.abstained,
            "reasons": dict(self.reasons),
            "acted": self.acted,
            "acting": self.acting.as_dict(),
            "seconds": self.seconds,
            "skill_by_cut": list(self.by_cut),
            "per_matrix": {
                name: score.as_dict() | (NO_NULL if null is None else null.as_dict())
                for name, (score, null) in self.per_matrix.items()
            },
            "failures": [failure.as_dict() for failure in self.failures],
        }


@dataclass(frozen=True)
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
        """Plain objects with the keys that docs/backtest.md lists."""
        return {
            "horizon": self.horizon,
            "cuts": list(self.cuts),
            "block": self.block,
            "draws": self.draws,
            "seed": self.seed,
            "matrices": self.matrices,
            "shared_seconds": self.shared_seconds,
            "notes": list(self.notes),
            "predictors": {name: judged.as_dict() for name, judged in self.predictors.items()},
        }


def skill_interval(sums: Tensor, block: int, seed: int) -> tuple[float, float] | None:
    """95% of the pooled skill under a circular block bootstrap over cuts (Politis and Romano 1992).

    ``sums`` (cuts, 3) are <P, P>, <P, D>, <D, D>. Blocks of ``block`` neighbouring cuts are drawn, which look at
    overlapping motion. None with fewer cuts than two blocks.
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
