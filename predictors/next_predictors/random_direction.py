"""random: a control that jumps as far as the run last moved, in a random direction."""

import zlib
from collections.abc import Sequence

import torch
from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import LowRankUpdate
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor, no_checkpoint_before
from next_core.settings import Settings


class RandomConfig(Settings):
    """Settings of the random direction."""

    seed: int = Field(0, ge=0, description="Seed of the directions")
    rank: int = Field(1, ge=1, description="Rank of the random matrix")


class RandomDirection(PerMatrixPredictor):
    """Per matrix X = |W_T - W_{T-h}| Q / |Q| with Q = L R, L (m, k) and R (k, n) Gaussian: a jump of rank k.

    Its norm is that of the motion over the last h steps (h the horizon), so whatever another predictor gains over this
    one comes from its direction. The direction depends on the seed, the step and the matrix's name only.
    """

    name = "random"
    space = "merged"
    config_class = RandomConfig
    requires = frozenset({"gram"})

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return no_checkpoint_before(steps, horizon)

    def reads_back(self, horizon: int, every: int) -> int:
        return horizon

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        newest = matrix.steps[-1]
        span = self.history.span(newest, newest - horizon)
        norm = self.history.inner_products([span])[matrix.name].clamp_min(0).sqrt().squeeze()
        if not norm > 0:
            return Abstain(f"the matrix did not move over the last {horizon} steps")
        (m, n), rank = matrix.shape, min(self.config.rank, *matrix.shape)
        key = f"{self.config.seed}/{newest}/{matrix.name}"
        random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        left, right = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((m, rank), (rank, n)))
        # Nothing cancels in this norm, because random columns are nearly orthogonal.
        return LowRankUpdate(LowRank(left * (norm / LowRank(left, right).norm()), right))
