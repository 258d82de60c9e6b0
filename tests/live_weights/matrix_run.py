"""A matrix trained by given gradients, whose optimizer's steps are followed."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from next_core.live_weights.optimizer_steps import OptimizerSteps
from next_core.live_weights.trained_weights import WholeWeights

SHAPE = (6, 5)


def scratch_of(owner: Any) -> Path:
    """A folder that is removed when ``owner`` is."""
    folder = tempfile.mkdtemp(prefix="next-core-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Run:
    """A matrix trained by given gradients; every coordinate is in the sample, some more than once."""

    def __init__(
        self,
        rate: float = 0.1,
        windows: tuple[int, ...] = (),
        rows: int = SHAPE[0],
        folder: Path | None = None,
        kind: Any = torch.optim.AdamW,
        **settings: Any,
    ) -> None:
        self.model = nn.Linear(SHAPE[1], rows, bias=False)
        with torch.no_grad():
            self.model.weight.zero_()
        self.optimizer = kind(self.model.parameters(), lr=rate, weight_decay=0, **settings)
        self.steps = OptimizerSteps(WholeWeights(self.model, self.optimizer), folder or scratch_of(self), windows)

    @property
    def weight(self) -> Tensor:
        return self.model.weight.detach().clone()

    def step(self, gradient: Tensor) -> None:
        self.model.weight.grad = gradient
        self.optimizer.step()
        self.steps.after_step()

    def train(self, seed: int, count: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            self.step(torch.randn(SHAPE, generator=generator))
