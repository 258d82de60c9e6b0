"""alpharl: fit each matrix's leading direction as a linear function of the accuracy; evaluate it at a higher one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from next_core.history.history import MatrixHistory
from next_core.interfaces import LowRankUpdate
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor
from next_core.settings import Settings
from next_core.types import Anchor

Array = np.ndarray[Any, np.dtype[np.float64]]
CONSTANT = 1e-7
"""A feature whose spread is below this part of the largest one is constant up to rounding. Standardising would scale
its noise up to the size of the others, so it keeps its mean instead."""


class AlphaRlConfig(Settings):
    """Settings of AlphaRL."""

    metric: str | None = Field(
        None, description="Logged metric to regress on (an accuracy or reward); none: the RL step itself"
    )
    target: float | None = Field(
        None, description="Value of the metric to reach; none: the value of its linear trend after the horizon"
    )
    anchor: Anchor = Field(
        "backbone",
        description="backbone: W_0 plus the predicted low-rank delta, as in the paper; newest: W_T plus its change, "
        "which keeps the part of W_T outside the leading components",
    )
    min_t: float = Field(
        2.0, ge=0, description="Abstain if the slope of the metric on the PLS score has a t value below this"
    )

    @model_validator(mode="after")
    def _target_is_of_a_metric(self) -> Self:
        if self.target is not None and self.metric is None:
            raise ValueError("target is a value of a metric; set metric")
        return self


@dataclass(frozen=True)
class Series:
    """The metric to regress on: the rows of the history that have it, its values y there, and the target y*."""

    rows: list[int]
    y: Array
    y_target: float


class AlphaRL(PerMatrixPredictor):
    """AlphaRL (arXiv 2510.00553): partial least squares with one component of x_t on y_t, inverted at y*.

    Per matrix, x_t = alpha(t) S(t) u(t) for its rank-k triplets side by side, with alpha(t) = ||D||_F / ||D_k||_F, and
    signs aligned from the newest checkpoint backwards. z is the PLS score of x on the metric y (features standardised),
    y = a z + b by least squares, z* = (y* - b) / a, and x* = mean + scale (z* p) with p the loading. x is cumulative,
    so the update x* v_T^T counts from W_0 (adding it to W_T, as the released script does, counts the motion twice).
    With anchor newest it is (x* - x_T) v_T^T, counted from W_T.
    """

    name = "alpharl"
    space = "merged"
    config_class = AlphaRlConfig
    requires = frozenset({"global", "metrics"})
    _series: Series

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        if len(steps) < 3:
            return f"a regression needs at least 3 checkpoints (got {len(steps)})"
        return None

    def prepare(self, horizon: int) -> Abstain | None:
        series = self._read_series(horizon)
        if isinstance(series, Abstain):
            return series
        self._series = series
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        found = matrix.components("global")
        # x has the norm of the whole delta: its leading triplets are scaled by ||D|| / ||D_k||.
        length = found.S.square().sum(-1).sqrt()
        alpha = torch.where(length > 0, found.energy.sqrt() / torch.where(length > 0, length, 1.0), 0.0)
        x = (alpha[:, None, None] * found.U * found.S[:, None, :]).double()  # (T, m, k)
        flat = x.flatten(1).numpy()
        target = invert(flat[self._series.rows], self._series.y, self._series.y_target, self.config.min_t)
        if isinstance(target, Abstain):
            return target
        # x varies over time through u and sigma. v_T stands for all v_t, which is why signs are aligned beforehand.
        left = torch.from_numpy(target).reshape(x.shape[1:])
        if self.anchor == "newest":
            left = left - x[-1]
        return LowRankUpdate(LowRank(left, found.V[-1].double().mT))

    def _read_series(self, horizon: int) -> Series | Abstain:
        steps, metric = self.history.steps, self.config.metric
        rows = list(range(len(steps)))
        if metric is None:
            y = np.array(steps, dtype=np.float64)
        else:
            values = self.history.metrics(metric)
            # Step 0 has no metrics, and a live trainer has not logged the newest step yet: leave these two out.
            optional = {0 if steps[0] == 0 else None, rows[-1]}
            rows = [row for row in rows if values[row] is not None or row not in optional]
            y = np.array([math.nan if values[row] is None else values[row] for row in rows], dtype=np.float64)
            missing = [steps[row] for row, value in zip(rows, y, strict=True) if not math.isfinite(value)]
            if missing:
                logged = ", ".join(sorted(self.history.source.metrics(self.history.newest))) or "none"
                return Abstain(f"no finite value of metric '{metric}' at steps {missing}; logged: {logged}")
        if len(rows) < 3:
            return Abstain(f"a regression needs at least 3 checkpoints (got {len(rows)})")
        if np.ptp(y) <= 1e-12 * np.abs(y).max():
            return Abstain(f"metric '{metric}' is {y[0]:g} at every checkpoint, so nothing can be fitted")
        t = np.array([steps[row] for row in rows], dtype=np.float64)
        slope = (t - t.mean()) @ (y - y.mean()) / ((t - t.mean()) @ (t - t.mean()))
        if self.config.target is None:
            return Series(rows, y, float(y.mean() + slope * (self.history.newest + horizon - t.mean())))
        ahead = self.config.target - y[-1]
        if ahead * slope <= 0:
            return Abstain(
                f"metric '{metric}' is {y[-1]:g} and moves by {slope:+.2g} per step, not towards target "
                f"{self.config.target:g}"
            )
        return Series(rows, y, self.config.target)


def invert(x: Array, y: Array, y_target: float, min_t: float) -> Array | Abstain:
    """Return x* (features,) at which a one-component PLS of x (T, features) on y (T,) predicts ``y_target``.

    Abstains where x does not vary with y, or where the t value of the slope is below ``min_t``.
    """
    from sklearn.cross_decomposition import PLSRegression  # imports pandas, half a second

    spread = x.std(0, ddof=1)
    alive = spread > CONSTANT * spread.max()
    standard = (x[:, alive] - x[:, alive].mean(0)) / spread[alive]
    if not alive.any() or np.abs(standard.T @ (y - y.mean())).max() <= 1e-12 * len(y) * np.ptp(y):
        return Abstain("the leading direction does not vary with the metric")
    pls = PLSRegression(n_components=1, scale=True).fit(x[:, alive], y)
    z = pls.transform(x[:, alive])[:, 0]
    # The scores are centred, so b is the mean of y.
    centred = y - y.mean()
    a = float(z @ centred / (z @ z))
    # The standard error of a slope: sqrt(residual variance / sum of z^2), with T - 2 degrees of freedom.
    residual = centred - a * z
    error = math.sqrt(float(residual @ residual) / (len(y) - 2) / float(z @ z))
    if abs(a) < min_t * error:
        t = abs(a) / error
        return Abstain(f"the slope of the metric on the PLS score is not distinguishable from 0 (t = {t:.2f})")
    z_target = (y_target - float(y.mean())) / a
    found = x.mean(0)
    found[alive] = pls.inverse_transform(np.array([[z_target]]))[0]
    return np.asarray(found, dtype=np.float64)
