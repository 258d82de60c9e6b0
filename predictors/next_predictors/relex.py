"""RELEX: the leading directions of a matrix's path over time, each continued by a straight line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import CoefficientConfig, Outcome, PerMatrixPredictor
from next_core.types import Anchor


class RelexConfig(CoefficientConfig):
    """Settings of RELEX."""

    rank: int | None = Field(
        None, ge=1, description="Time components that are extrapolated; none: the rank of the history"
    )
    anchor: Anchor = Field(
        "backbone",
        description="backbone: W_0 plus the extrapolated components, as in the paper; newest: W_T plus their change, "
        "which keeps what of W_T lies outside them",
    )


class Relex(PerMatrixPredictor):
    """RELEX (arXiv 2605.21468): SVD over time of M[t] = vec(W_t - W_0), not centred, then least squares.

    From M M^T = Q diag(s^2) Q^T: component i has coefficients c_i = s_i q_i over time along the unit direction
    M^T q_i / s_i. Each c_i is fitted by a line with intercept over all checkpoints and read off at t_T + h, so that
    the update is a combination of the observed deltas and no matrix is formed. The line is over the RL steps (the
    paper: over the checkpoint index, which is the same for evenly spaced checkpoints).
    """

    name = "relex"
    config_class = RelexConfig
    requires = frozenset({"gram"})

    @property
    def anchor(self) -> Anchor:
        anchor: Anchor = self.config.anchor
        return anchor

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return "relex: a line over time needs at least 2 checkpoints (got 1)" if len(steps) < 2 else None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        squares, Q = torch.linalg.eigh(matrix.gram())
        # Ascending: the last are the leading ones. What is zero to rounding has no direction.
        kept = (squares > squares[-1] * len(squares) * torch.finfo(squares.dtype).eps).nonzero().flatten()
        kept = kept[-(self.config.rank or self.history.rank) :]
        s, Q = squares[kept].sqrt(), Q[:, kept]
        c = s * Q
        steps = torch.tensor(matrix.steps, dtype=c.dtype)
        lever = steps - steps.mean()
        slope = lever @ c / (lever @ lever)
        c_target = c.mean(0) + slope * (matrix.steps[-1] + horizon - steps.mean())
        if self.anchor == "newest":
            c_target = c_target - c[-1]
        weights = Q @ (c_target / s)
        return CoefficientUpdate(dict(zip(matrix.steps, weights.tolist(), strict=True)), self.config.space)
