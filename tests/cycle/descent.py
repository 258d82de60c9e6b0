"""A backend whose trainer is plain gradient descent on least squares: small enough to follow by hand, and real."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch

from next_core.backend import Backend, LoggedReward
from next_core.interfaces import Applied, Prediction
from next_core.live_weights.in_memory import InMemoryApplied, InMemoryApplier
from next_core.live_weights.optimizer_steps import OptimizerSteps
from next_core.live_weights.trained_weights import WholeWeights
from next_core.sources.memory import MemorySource
from tests.live_weights.matrix_run import scratch_of


class Descent(Backend):
    """Minimises |W - W*|^2 / 2 by gradient descent; accuracy is exp(-loss)."""

    name = "descent"
    in_process: ClassVar[bool] = True
    forgets = True

    def __init__(self, lr: float = 0.01, accuracy: Callable[[float], float] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = torch.nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(4, 6, generator=generator))
        self.goal = torch.randn(4, 6, generator=generator)
        self.backbone = self.model.weight.detach().clone()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.step, self.calls = 0, 0
        self.checkpoints: dict[int, Any] = {}
        self.forgotten: list[int] = []
        self.shift = torch.zeros(4, 6)
        self.kept: dict[int, InMemoryApplied] = {}
        self._stopped = False
        self.logged: list[LoggedReward] = []
        self._accuracy = accuracy or (lambda loss: float(torch.tensor(-loss).exp()))

    def follow_steps(self, windows: Sequence[int]) -> None:
        self._steps = OptimizerSteps(WholeWeights(self.model, self.optimizer), scratch_of(self), windows)
        self._steps.keep(0)

    @property
    def steps(self) -> OptimizerSteps:
        return self._steps

    def rewards(self) -> Sequence[LoggedReward]:
        return self.logged

    @property
    def loss(self) -> float:
        return float((self.model.weight.detach() - self.goal).square().sum() / 2)

    def prepare(self, run: Any, out: Any, resume: bool = False) -> int:
        return 0

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        self.calls += 1
        while self.step < until and not self._stopped:
            self.optimizer.zero_grad()
            ((self.model.weight - self.goal).square().sum() / 2).backward()
            self.optimizer.step()
            self.step += 1
            step_ended(self.step)

    def stop(self) -> None:
        self._stopped = True

    def observe(self, step: int) -> None:
        self.checkpoints[step] = {"weight": self.model.weight.detach().clone() - self.shift}

    def source(self) -> MemorySource:
        return MemorySource(self.checkpoints, backbone={"weight": self.backbone})

    def forget(self, step: int, kept: Callable[[int, Sequence[int]], Sequence[range]]) -> None:
        gone = [at for at in self.checkpoints if not any(at in steps for steps in kept(step, ()))]
        self.forgotten += gone
        for at in gone:
            del self.checkpoints[at]

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> InMemoryApplied:
        before = self.model.weight.detach().clone()
        applied = InMemoryApplier().apply(prediction, alpha, out=self.model)
        self.shift += self.model.weight.detach() - before
        if keep:
            self.kept[prediction.step] = applied
        return applied

    def active_jump(self, step: int) -> InMemoryApplied | None:
        return self.kept.get(step)

    def rollback(self, applied: Applied, step: int) -> None:
        after = self.model.weight.detach().clone()
        applied.rollback()
        self.shift += self.model.weight.detach() - after
        if step > max(self.checkpoints):  # undone some steps later: the trajectory starts anew
            self.checkpoints.clear()

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        return self._accuracy(self.loss)


class LaunchedDescent(Descent):
    """The same trainer, run as segments."""

    name = "launched-descent"
    in_process = False
