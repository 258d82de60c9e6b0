"""What process 0 changed in its model, repeated in the others bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from next_backends.trl.processes import Processes
from next_core.errors import BackendError, describe
from next_core.live_weights.in_memory import activate_jumps, is_peft, jump_adapters, remove_adapter
from next_core.process.containment import same_random_states
from next_core.sources.layouts import JUMP_PREFIX

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


@dataclass(frozen=True)
class Change:
    """What process 0 did to its model after a step.

    ``multiple`` is that of the steps that follow; None without step scaling. ``moved`` says whether tensors changed.
    ``moments``: where a rollback put optimizer moments back, the values of each trained parameter's state that are not
    tensors; None where the moments did not change.
    """

    multiple: float | None
    moved: bool
    removed: tuple[str, ...]
    added: tuple[tuple[str, Any], ...]
    moments: Mapping[str, Mapping[str, Any]] | None

    @classmethod
    def since(
        cls, before: Mapping[str, Any], model: nn.Module, optimizer: Any, moved: Set[str], multiple: float | None
    ) -> Change:
        """Return the change from ``adapters(model)`` before to now; ``moved`` names what moved, weights or moments.

        Configs are compared by identity: an adapter that was removed may have given its name to a new one.
        """
        now = adapters(model)
        moments = "moments" in moved
        states = _states(model, optimizer) if moments else []
        values = {name: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for name, state in states}
        return cls(
            multiple=multiple,
            moved=bool(moved),
            removed=tuple(name for name, config in before.items() if now.get(name) is not config),
            added=tuple((name, config) for name, config in now.items() if before.get(name) is not config),
            moments=values if moments else None,
        )

    def prepare(self, model: Any, optimizer: Any) -> None:
        """Give a model the same adapters; their tensors are still to be received."""
        for name in self.removed:
            remove_adapter(model, name)
        with same_random_states():  # PEFT draws initial values, which are overwritten
            for name, config in self.added:
                model.add_adapter(name, config)
        if self.added:
            activate_jumps(model)
        for name, state in [] if self.moments is None else _states(model, optimizer):
            values = self.moments.get(name) if self.moments else None
            if values is None:  # process 0 went back to a new optimizer
                state.clear()
            else:
                state |= values

    def tensors(self, model: nn.Module, optimizer: Any) -> Iterator[Tensor]:
        """Yield all that may have changed, in an order that is the same in every process."""
        new = tuple(f".{name}." for name, _ in self.added)
        for name, tensor in sorted(moving_tensors(model).items()):
            if tensor.requires_grad or any(part in name for part in new):
                yield tensor.detach()
        if self.moments is not None:
            for _, state in _states(model, optimizer):
                yield from (state[key] for key in sorted(state) if isinstance(state[key], Tensor))


@torch.no_grad()
def repeat(processes: Processes, change: Change, model: nn.Module, optimizer: Any, where: str) -> None:
    """Make the others' model and optimizer moments what process 0 has after ``change``, bit for bit."""
    problem, tensors = None, list[Tensor]()
    try:
        if not processes.leads:
            change.prepare(model, optimizer)
        tensors = list(change.tensors(model, optimizer))
    except Exception as error:  # the others must not wait for tensors that are never received
        problem = describe(error)
    layout = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
    answers = processes.gather((problem, layout), where)
    for other, (theirs, held) in enumerate(answers):
        if theirs is not None or held != answers[0][1]:
            why = theirs or "its tensors have other shapes"
            raise BackendError(
                f"{where}, process {other} could not repeat the jump of process 0: {why}",
                kind="backend-processes-differ",
            )
    processes.broadcast_tensors(tensors, where)


def check_same_weights(processes: Processes, model: nn.Module, where: str) -> None:
    """Raise ``BackendError`` in every process unless all hold the same bits of everything that trains."""
    mine = digests(moving_tensors(model))
    if len(set(processes.gather(hashlib.sha256(repr(mine).encode()).digest(), where))) == 1:
        return
    held = processes.gather(mine, where)
    for other, theirs in enumerate(held):
        names = sorted(name for name in {*held[0], *theirs} if held[0].get(name) != theirs.get(name))
        if names:
            raise BackendError(
                f"{where}, process {other} holds other weights than process 0: '{names[0]}'"
                + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
                + "; something changes the model in one process only. No jump was made; fix that, and resume from a "
                "checkpoint from before",
                kind="backend-processes-differ",
            )


def adapters(model: Any) -> dict[str, Any]:
    """Return the jump adapters of a model with their PEFT configs, in the order they were made."""
    return {name: model.peft_config[name] for name in jump_adapters(model)} if is_peft(model) else {}


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all that trains, and the jump adapters: what every process has to hold alike."""
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.requires_grad or (".lora_" in name and f".{JUMP_PREFIX}" in name)
    }


@torch.no_grad()
def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a number for the bits of each tensor and their places: a weighted sum, computed on its device.

    Products and sums wrap around. The weights are odd, hence invertible: no bit of an element is lost. They differ
    within a chunk, and chunks are combined as a polynomial, so that places count too.
    """
    places: dict[torch.device, Tensor] = {}
    sums = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        if bits.device not in places:
            places[bits.device] = 2 * torch.arange(_CHUNK, dtype=torch.int32, device=bits.device) + 1
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for chunk in torch.split(bits, _CHUNK):
            total = total * 1_000_003 + (chunk * places[bits.device][: len(chunk)]).sum(dtype=torch.int64)
        sums.append(total)
    return {name: int(total) for name, total in zip(tensors, sums, strict=True)}


def _states(model: nn.Module, optimizer: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the optimizer's state of each parameter that has one, by name, in the order of the names."""
    named = ((name, optimizer.state.get(parameter)) for name, parameter in model.named_parameters())
    return sorted(((name, state) for name, state in named if state), key=lambda item: item[0])
