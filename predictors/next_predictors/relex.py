"""relex: continue the leading directions of a matrix's trajectory, each along a straight line in time."""

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
        None, ge=1, description="Number of time components to extrapolate; none: the rank of the history"
    )
    anchor: Anchor = Field(
        "backbone",
        description="backbone: W_0 plus the extrapolated components, as in the paper; newest: W_T plus their change, "
        "which keeps the part of W_T outside them",
    )


class Relex(PerMatrixPredictor):
    """RELEX (arXiv 2605.21468): SVD over time of M[t] = vec(W_t - W_0), not centred, then least squares.

    M M^T = Q diag(s^2) Q^T gives component i the coefficients c_i = s_i q_i over time, along the unit direction
    M^T q_i / s_i. A line with intercept is fitted to each c_i over all checkpoints and evaluated at t_T + h. The update
    is then a combination of the observed deltas, sum_i c_i(t_T + h) M^T q_i / s_i, and no matrix is formed. The line is
    over RL steps; the paper's is over the checkpoint index, which is the same for evenly spaced checkpoints.
    """

    name = "relex"
    config_class = RelexConfig
    requires = frozenset({"gram"})

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return "a line over time needs at least 2 checkpoints (got 1)" if len(steps) < 2 else None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        squares, Q = torch.linalg.eigh(matrix.gram())
        # Eigenvalues ascend, so the leading ones are last. Those that are zero up to rounding have no direction.
        kept = (squares > squares[-1] * len(squares) * torch.finfo(squares.dtype).eps).nonzero().flatten()
        kept = kept[-(self.config.rank or self.history.rank) :]
        s, Q = squares[kept].sqrt(), Q[:, kept]
        c = s * Q  # (T, k): row t has the coordinates of W_t - W_0 along the unit directions M^T q_i / s_i
        steps = torch.tensor(matrix.steps, dtype=c.dtype)
        centred = steps - steps.mean()
        slope = centred @ c / (centred @ centred)
        c_target = c.mean(0) + slope * (matrix.steps[-1] + horizon - steps.mean())
        if self.anchor == "newest":
            c_target = c_target - c[-1]
        # sum_i c_i M^T q_i / s_i = M^T (Q (c / s)): a weight for each row of M. The signs of the q_i cancel in it.
        weights = Q @ (c_target / s)
        return CoefficientUpdate(dict(zip(matrix.steps, weights.tolist(), strict=True)), self.config.space)
