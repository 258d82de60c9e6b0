"""A control: as long a jump as the run's own last motion, in a direction that nothing decides but a seed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from next_core.history.history import MatrixHistory
from next_core.interfaces import LowRankUpdate
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor
from next_core.settings import Settings


class RandomConfig(Settings):
    """Settings of the random direction."""

    seed: int = Field(0, ge=0, description="Seed of the directions")
    rank: int = Field(1, ge=1, description="Rank of the random matrix")


class RandomDirection(PerMatrixPredictor):
    """Per matrix X = |W_T - W_{T-h}| Q / |Q|, Q = L R with L (m, k) and R (k, n) Gaussian: a jump of rank k.

    The norm is that of the last h steps' motion (h the horizon), so that whatever another predictor gains over this one
    is owed to its direction. Seed, step and the matrix's name decide the direction, and not the order of the matrices.
    """

    name = "random"
    config_class = RandomConfig
    requires = frozenset({"gram"})

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        newest = steps[-1]
        if newest - horizon in {0, *steps}:
            return None
        there = sorted(newest - step for step in {0, *steps} if step < newest)
        return f"random: no checkpoint {horizon} steps before step {newest}; horizons that are: {there}"

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        newest = matrix.steps[-1]
        before = newest - horizon
        # A step 0 without a checkpoint is where RL began.
        span = newest, before if before in matrix.steps else None
        norm = self.history.inner_products([span])[matrix.name].clamp_min(0).sqrt().squeeze()
        if not norm > 0:
            return Abstain(f"random: it stood still over the last {horizon} steps")
        (m, n), rank = matrix.shape, min(self.config.rank, *matrix.shape)
        key = f"{self.config.seed}/{newest}/{matrix.name}"
        random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        left, right = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((m, rank), (rank, n)))
        return LowRankUpdate(LowRank(left * (norm / _norm(left, right)), right))


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """|L R|_F, which does not cancel for independent columns."""
    return ((left.mT @ left) * (right @ right.mT)).sum().sqrt()
