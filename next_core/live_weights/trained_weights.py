"""The trained weights of a live model, wherever its trainer keeps them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from next_core.errors import unsupported
from next_core.live_weights.processes import Processes


@dataclass(frozen=True)
class Shard:
    """A tensor that the optimizer steps on and that this process is responsible for.

    ``tensor`` shares memory with a weight, a part of it, or their fp32 masters. ``key`` finds its moments in the
    optimizer's state, and ``group`` is the index of its parameter group.
    """

    tensor: Tensor
    key: Any
    group: int


class TrainedWeights(ABC):
    """Access to trained weights that may be sharded over processes, or have fp32 masters.

    Every process of a run calls every method at the same point. Together the ``shards`` of all processes hold each
    trained weight once.
    """

    forward_needs_all: bool = False
    """Whether a forward pass is a collective of all processes."""

    resumes_adapters: ClassVar[bool] = True
    """Whether a trainer that resumes loads the frozen adapters in its checkpoint."""

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        self.model = model
        self.optimizer = optimizer
        """The ``torch.optim`` optimizer; None for a model that does not train."""
        self.parameters: dict[str, nn.Parameter] = {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """What this process is responsible for, in the order of the optimizer's groups."""

    def state(self, shard: Shard) -> dict[str, Any]:
        """Return the optimizer's state of a shard; empty before its first step."""
        found: dict[str, Any] = getattr(self.optimizer, "state", {}).get(shard.key, {})
        return found

    def group(self, shard: Shard) -> dict[str, Any]:
        """Return the optimizer's parameter group of a shard; empty without an optimizer."""
        groups: list[dict[str, Any]] = getattr(self.optimizer, "param_groups", None) or [{}]
        return groups[shard.group]

    def check(self) -> None:  # noqa: B027 - most have nothing to do
        """Raise ``BackendError`` if what trains is not what the shards hold."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one whole weight in the precision that it trains in; the same in every process, and not a copy."""

    @abstractmethod
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Replace whole weights by name: the masters, and what the next forward pass uses."""

    @abstractmethod
    def publish(self, moments: bool = False) -> None:
        """Give all copies of the weights, in other processes or precisions, what the shards hold now.

        ``moments``: the optimizer's state of the shards has changed too.
        """

    def after_evaluation(self) -> None:  # noqa: B027 - most have nothing to do
        """Undo what forward passes without a backward pass leave."""

    def adapters_changed(self) -> None:  # noqa: B027 - most have nothing to do
        """Take account of frozen adapters that were added or removed."""


class WholeWeights(TrainedWeights):
    """A model that every process holds as a whole: in one process, or data parallel. Process 0 is responsible."""

    def __init__(self, model: nn.Module, optimizer: Any = None, processes: Processes | None = None) -> None:
        super().__init__(model, optimizer)
        self._processes = processes
        groups = getattr(optimizer, "param_groups", None) or [{"params": list(model.parameters())}]
        everything = [Shard(p, p, index) for index, group in enumerate(groups) for p in group["params"]]
        # A model that does not train at all may be moved as well, such as an adapter loaded for inference.
        self._all = [shard for shard in everything if shard.tensor.requires_grad] or everything
        if not self.parameters:
            self.parameters = dict(model.named_parameters())

    @property
    def shards(self) -> Sequence[Shard]:
        return self._all if self._processes is None or self._processes.leads else []

    def check(self) -> None:
        if self.optimizer is None:
            return
        trained = {p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if trained != {shard.key for shard in self._all} or not trained <= {*self.model.parameters()}:
            raise unsupported(
                f"{type(self.optimizer).__name__} steps on other weights than the model's that trained when training "
                "began; unfreeze weights before it, and use no layer-wise optimizer"
            )

    def read(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def publish(self, moments: bool = False) -> None:
        if self._processes is None:
            return
        tensors = [shard.tensor.detach() for shard in self._all]
        states = [self.state(shard) for shard in self._all] if moments else []
        counting = [group for group in self.optimizer.param_groups if "step" in group] if moments else []
        states += (counted := [{"step": group["step"]} for group in counting])
        held = [{key: None if isinstance(value, Tensor) else value for key, value in state.items()} for state in states]
        for state, theirs in zip(states, self._processes.share(held), strict=True):
            if not theirs:  # process 0 went back to a new optimizer
                state.clear()
            state |= {key: value for key, value in theirs.items() if value is not None}
            tensors += [state[key] for key, value in theirs.items() if value is None]
        self._processes.broadcast_tensors(tensors)
        for group, step in zip(counting, counted, strict=True):
            group |= step
