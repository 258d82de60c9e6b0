"""A run in several processes: process 0 decides and writes, the others do to their models what it did to its own."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from next_core.errors import BackendError, NextCoreError, describe
from next_core.live_weights.in_memory import activate_jumps, is_peft, jump_adapters, remove_adapter
from next_core.process.containment import same_random_states
from next_core.sources.adapter_source import JUMP_PREFIX

Answer = TypeVar("Answer")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


class Processes:
    """This process among those of a data-parallel run; in a run of one process nothing is asked and nothing sent.

    Every method is called by all processes at the same point. They talk over a group of their own (gloo): waiting for
    a long probe keeps no GPU busy and none of the trainer's collectives open. Tensors on a GPU go over the trainer's
    group. A process that waits longer than ``timeout`` seconds, or whose peer is gone, raises ``BackendError``.
    """

    def __init__(self, index: int = 0, count: int = 1, timeout: float = 1800.0) -> None:
        self.index, self.count, self.timeout = index, count, timeout
        self._group: Any = None
        if count > 1:
            with self._waiting("when training began"):
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def first(self, act: Callable[[], Answer], where: str) -> Answer:
        """Let process 0 ``act`` while the others wait. All return what it returned, or raise what it raised.

        An error of ours keeps its class; any other becomes a ``BackendError`` in the processes that only hear of it.
        """
        if self.count == 1:
            return act()
        if self.leads:
            try:
                answer = act()
            except BaseException as error:
                with contextlib.suppress(Exception):  # its own error is what counts
                    self._send(Failure.of(error), where)
                raise
            self._send(answer, where)
            return answer
        heard = self._send(None, where)
        if isinstance(heard, Failure):
            raise heard.error()
        told: Answer = heard
        return told

    def barrier(self, where: str) -> None:
        """Wait until all are here."""
        if self.count > 1:
            self._gather(None, where)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise ``BackendError`` where the processes were given different values: they would act at other steps."""
        if self.count == 1:
            return
        given = self._gather(dict(settings), "when training began")
        for other, theirs in enumerate(given):
            for name, value in theirs.items():
                if value != given[0].get(name):
                    raise BackendError(
                        f"process {other} was given {name}={value!r} and process 0 {given[0].get(name)!r}; make the "
                        "same callback in every process"
                    )

    def check_weights(self, model: nn.Module, where: str) -> None:
        """Raise ``BackendError`` in every process where they do not hold the same bits of all that trains."""
        if self.count == 1:
            return
        mine = digests(moving_tensors(model))
        if len(set(self._gather(hashlib.sha256(repr(mine).encode()).digest(), where))) == 1:
            return
        held = self._gather(mine, where)
        for other, theirs in enumerate(held):
            names = sorted(name for name in {*held[0], *theirs} if held[0].get(name) != theirs.get(name))
            if names:
                raise BackendError(
                    f"{where}, process {other} holds other weights than process 0: '{names[0]}'"
                    + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
                    + "; something changes the model in one process only. Nothing was extrapolated; mend that and "
                    "resume from a checkpoint from before"
                )

    def share(self, change: Change | None, model: nn.Module, optimizer: Any, where: str) -> None:
        """Make the others' model and optimizer moments what process 0 has after ``change``, bit for bit."""
        if self.count == 1 or change is None:
            return
        problem, tensors = None, list[Tensor]()
        try:
            if not self.leads:
                change.follow(model, optimizer)
            tensors = list(change.tensors(model, optimizer))
        except Exception as error:  # the others must not wait for tensors that are never taken
            problem = describe(error)
        layout = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        answers = self._gather((problem, layout), where)
        for other, (theirs, held) in enumerate(answers):
            if theirs is not None or held != answers[0][1]:
                why = theirs or "it holds tensors of other shapes"
                raise BackendError(f"{where}, process {other} could not follow process 0: {why}")
        with self._waiting(where), torch.no_grad():
            under_way = []
            for tensor in tensors:
                whole = tensor.contiguous()
                group = self._group if whole.device.type == "cpu" else None
                under_way.append((dist.broadcast(whole, src=0, group=group, async_op=True), tensor, whole))
            for work, tensor, whole in under_way:
                work.wait()
                if whole is not tensor:
                    tensor.copy_(whole)

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _send(self, message: Any, where: str) -> Any:
        """What process 0 sends; its own argument is what counts."""
        box = [message]
        with self._waiting(where, "process 0" if not self.leads else "the others"):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _gather(self, message: Any, where: str) -> list[Any]:
        """What every process says, in their order."""
        box: list[Any] = [None] * self.count
        with self._waiting(where):
            dist.all_gather_object(box, message, group=self._group)
        return box

    @contextlib.contextmanager
    def _waiting(self, where: str, whom: str = "the others") -> Iterator[None]:
        """What torch.distributed raises, in words."""
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if time.monotonic() - start >= self.timeout:
                raise BackendError(
                    f"process {self.index} waited {self.timeout:g} s for {whom} {where}; if a probe (`evaluate`) or a "
                    "fit takes that long, set the trainer's ddp_timeout higher"
                ) from error
            raise BackendError(
                f"process {self.index} lost the others {where}: one of them has ended, and its own output says why; "
                "resume from the last checkpoint"
            ) from error


@dataclass(frozen=True)
class Change:
    """What process 0 did to its model after a step.

    ``moments``: where a rollback put optimizer moments back, the values of each trained parameter's state that are no
    tensors; None where the moments stayed.
    """

    removed: tuple[str, ...]
    added: tuple[tuple[str, Any], ...]
    moments: Mapping[str, Mapping[str, Any]] | None

    @classmethod
    def since(cls, before: Mapping[str, Any], model: nn.Module, optimizer: Any, moments: bool) -> Change:
        """From ``adapters(model)`` before to now; configs are compared as objects, for a name may be given anew."""
        now = adapters(model)
        states = _states(model, optimizer) if moments else []
        values = {name: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for name, state in states}
        return cls(
            removed=tuple(name for name, config in before.items() if now.get(name) is not config),
            added=tuple((name, config) for name, config in now.items() if before.get(name) is not config),
            moments=values if moments else None,
        )

    def follow(self, model: Any, optimizer: Any) -> None:
        """Give a model the same adapters; their tensors are still to come."""
        for name in self.removed:
            remove_adapter(model, name)
        with same_random_states():  # PEFT draws a start that is overwritten
            for name, config in self.added:
                model.add_adapter(name, config)
        if self.added:
            activate_jumps(model)
        for name, state in _states(model, optimizer) if self.moments is not None else ():
            state |= (self.moments or {})[name]

    def tensors(self, model: nn.Module, optimizer: Any) -> Iterator[Tensor]:
        """All that may have changed, in an order that is the same in every process."""
        new = tuple(f".{name}." for name, _ in self.added)
        for name, tensor in sorted(moving_tensors(model).items()):
            if tensor.requires_grad or any(part in name for part in new):
                yield tensor.detach()
        if self.moments is not None:
            for _, state in _states(model, optimizer):
                yield from (state[key] for key in sorted(state) if isinstance(state[key], Tensor))


@dataclass(frozen=True)
class Failure:
    """What process 0 raised, as the others raise it."""

    kind: type[NextCoreError]
    message: str
    exit_code: int

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        if isinstance(error, NextCoreError):  # of a subclass that is somebody else's, the class of ours above it
            ours = next(kind for kind in type(error).__mro__ if kind.__module__ == NextCoreError.__module__)
            return cls(ours, str(error), error.exit_code)
        return cls(BackendError, f"process 0 failed: {describe(error)}", BackendError.exit_code)

    def error(self) -> NextCoreError:
        """As process 0 has it; a constructor of the class's own is not asked."""
        error = self.kind.__new__(self.kind, self.message)
        error.exit_code = self.exit_code
        return error


def adapters(model: Any) -> dict[str, Any]:
    """The jump adapters of a model with their PEFT configs, in the order they were made."""
    return {name: model.peft_config[name] for name in jump_adapters(model)} if is_peft(model) else {}


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that trains, and the jump adapters: what every process has to hold alike."""
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.requires_grad or (".lora_" in name and f".{JUMP_PREFIX}" in name)
    }


@torch.no_grad()
def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for the bits of each tensor and their places: a weighted sum, made on its device."""
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
    """The optimizer's state of each parameter that has one, by name, in the order of the names."""
    named = ((name, optimizer.state.get(parameter)) for name, parameter in model.named_parameters())
    return sorted(((name, state) for name, state in named if state), key=lambda item: item[0])
