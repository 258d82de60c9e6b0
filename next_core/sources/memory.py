"""Checkpoints given as tensors: for tests, notebooks, and trainers that keep their history in memory."""

from collections.abc import Mapping

from torch import Tensor

from next_core.errors import CheckpointError, not_found
from next_core.interfaces import CheckpointSource
from next_core.mathematics import low_rank
from next_core.mathematics.low_rank import LowRank
from next_core.types import LoraFactors, Parameter


class MemorySource(CheckpointSource):
    """``checkpoints[step][name]`` is a ``LoraFactors``, or a dense (m, n) weight with its backbone in ``backbone``."""

    name = "memory"

    def __init__(
        self,
        checkpoints: Mapping[int, Mapping[str, LoraFactors | Tensor]],
        backbone: Mapping[str, Tensor] | None = None,
        metrics: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self._checkpoints = {step: dict(checkpoints[step]) for step in sorted(checkpoints)}
        self._backbone = dict(backbone or {})
        self._metrics = dict(metrics or {})

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self._checkpoints)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        newest = self._checkpoints[self.steps[-1]]
        return tuple(
            Parameter(name, (value.B.shape[0], value.A.shape[1]), rank=value.A.shape[0])
            if isinstance(value, LoraFactors)
            else Parameter(name, (value.shape[0], value.shape[1]))
            for name, value in newest.items()
        )

    def _value(self, name: str, step: int) -> LoraFactors | Tensor:
        try:
            return self._checkpoints[step][name]
        except KeyError:
            raise not_found(f"no parameter '{name}' at step {step}; observed steps: {self.steps}") from None

    def factors(self, name: str, step: int) -> LoraFactors | None:
        value = self._value(name, step)
        return value if isinstance(value, LoraFactors) else None

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        now = self._value(name, step)
        if isinstance(now, LoraFactors):
            then = self.factors(name, since) if since is not None else None
            return lora_delta(now, then)
        if since is None and name not in self._backbone:
            raise CheckpointError(f"the backbone has no '{name}'; pass backbone=", kind="config-missing-backbone")
        before = self._backbone[name] if since is None else self._value(name, since)
        assert isinstance(before, Tensor)
        return now.double() - before.double()

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        return self._metrics


def lora_delta(now: LoraFactors, then: LoraFactors | None) -> LowRank:
    """Return scaling * (B A - B' A') as a low-rank matrix; without ``then``, the delta from the backbone."""
    if then is None:
        return LowRank(now.scaling * now.B.double(), now.A.double())
    return low_rank.lora_difference((now.A, now.B), (then.A, then.B), now.scaling)
