"""The processes of one run: process 0 decides, and the others carry out their part of what it does."""

import contextlib
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from next_core.errors import BackendError, NextCoreError, describe, trainer_failed, trainer_lost

Answer = TypeVar("Answer")
Owner = TypeVar("Owner")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class _Call:
    """What process 0 asks of the others: a method of the object that they registered as this one."""

    owner: int
    method: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Processes:
    """This process among the ``count`` processes of a run.

    Process 0 acts in ``lead``, and the others wait there. A method marked ``everywhere`` that it calls meanwhile runs
    in all of them, on the object that each has registered in its place: all register theirs in the same order.

    They talk over a gloo group of their own: waiting for a long probe keeps no GPU busy and none of the trainer's
    collectives open. Tensors on a GPU go over the trainer's group. A process that waits longer than ``timeout``
    seconds, or whose peer is gone, raises ``BackendError``.
    """

    def __init__(self, index: int, count: int, timeout: float) -> None:
        self.index, self.count, self.timeout = index, count, timeout
        self._owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._where, self._acting = "when training began", False
        self._broken: BackendError | None = None
        with self._waiting(self._where):
            self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def register(self, owner: Any) -> None:
        """Make an object known whose methods process 0 may call everywhere."""
        if self._number(owner) is None:
            self._owners[next(self._numbers)] = owner

    def _number(self, owner: Any) -> int | None:
        return next((number for number, one in self._owners.items() if one is owner), None)

    def lead(self, where: str, act: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call ``act`` in process 0; the others carry out what it calls everywhere. All return or raise as it does.

        An error of ours keeps its class; any other becomes a ``BackendError`` in the other processes.
        """
        self._where = where
        if self.leads:
            try:
                answer = act(*arguments)
                self._raise_broken()
            except BaseException as error:
                with contextlib.suppress(Exception):  # the error itself matters more
                    self.share(as_ours(error))
                raise
            self.share(answer)
            return answer
        while isinstance(received := self.share(None), _Call):
            method = getattr(self._owners[received.owner], received.method)
            try:
                self._together(functools.partial(method, *received.arguments, **received.named))
            except BackendError as error:
                if error is not self._broken:  # otherwise process 0 says what becomes of the run
                    raise
        if isinstance(received, NextCoreError):
            raise received
        return cast(Answer, received)

    def call(self, owner: Any, method: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
        """Call a method of ``owner`` in every process, from process 0. Returns what it returned here.

        Raises what it raised here. If it failed in another process alone, the processes may differ: ``BackendError``
        is raised here and, whatever becomes of that, at the end of ``lead``.
        """
        act = functools.partial(method, owner, *arguments, **named)
        if self._acting or not self.leads:  # it was called as a part of another one
            return act()
        number = self._number(owner)
        assert number is not None  # whatever has methods marked ``everywhere`` registers itself
        self.share(_Call(number, method.__name__, arguments, named))
        return self._together(act)

    def _together(self, act: Callable[[], Answer]) -> Answer:
        """Run this process's part of a call, and learn how the others fared."""
        self._acting, failed, answer = True, None, None
        try:
            answer = act()
        except Exception as error:
            failed = error
        finally:
            self._acting = False
        problems = self.gather(None if failed is None else describe(failed))
        if failed is not None and self.leads:
            raise failed
        for other, problem in enumerate(problems):
            if problem is not None:
                self._broken = BackendError(
                    f"{self._where}, process {other} could not do as process 0: {problem}",
                    kind="backend-processes-differ",
                )
                raise self._broken
        return answer  # type: ignore[return-value]  # nothing failed

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def share(self, message: Any) -> Any:
        """Return process 0's message in every process."""
        box = [message]
        with self._waiting(self._where, "the others" if self.leads else "process 0"):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum of every process's numbers, which are on the CPU."""
        with self._waiting(self._where):
            dist.all_reduce(numbers, group=self._group)
        return numbers

    def gather(self, message: Any, where: str | None = None) -> list[Any]:
        """Return every process's message, in the order of the processes: all wait until they are here."""
        box: list[Any] = [None] * self.count
        with self._waiting(where or self._where):
            dist.all_gather_object(box, message, group=self._group)
        return box

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise ``BackendError`` where processes have different settings: they would act at different steps."""
        given = self.gather(dict(settings))
        for other, theirs in enumerate(given):
            for name, value in theirs.items():
                if value != given[0].get(name):
                    raise BackendError(
                        f"process {other} was given {name}={value!r} and process 0 {given[0].get(name)!r}; make the "
                        "same callback in every process",
                        kind="backend-processes-differ",
                    )

    def broadcast_tensors(self, tensors: list[Tensor]) -> None:
        """Overwrite the tensors of every process with those of process 0."""
        with self._waiting(self._where):
            under_way = []
            for tensor in tensors:
                whole = tensor.contiguous()
                group = self._group if whole.device.type == "cpu" else None
                under_way.append((dist.broadcast(whole, src=0, group=group, async_op=True), tensor, whole))
            for work, tensor, whole in under_way:
                work.wait()
                if whole is not tensor:
                    tensor.copy_(whole)

    @contextlib.contextmanager
    def in_step(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Let a forward pass of ``modules`` begin in every process or in none: it may wait for all of them.

        Where one process has raised an error, or is done, the others raise ``BackendError`` before their next pass.
        """
        begins, ends = "begins a forward pass", "makes no more forward passes"
        parted = False

        def meet(state: str) -> None:
            nonlocal parted
            states = self.gather(state)
            parted = len(set(states)) > 1 or state not in (begins, ends)
            if parted and state in (begins, ends):
                other = next(number for number, theirs in enumerate(states) if theirs != state)
                raise BackendError(
                    f"{self._where}, process {other} {states[other]} while process {self.index} {state}; an `evaluate` "
                    "has to do the same in every process",
                    kind="backend-processes-differ",
                )

        def before(*_: Any) -> None:
            meet(begins)

        hooks = [module.register_forward_pre_hook(before, prepend=True) for module in modules]
        try:
            yield
            meet(ends)
        except Exception as error:
            if not parted:
                meet(f"fails ({describe(error)})")
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        """Destroy the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @contextlib.contextmanager
    def _waiting(self, where: str, whom: str = "the others") -> Iterator[None]:
        """Turn what torch.distributed raises into ``BackendError``."""
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if time.monotonic() - start >= self.timeout:
                raise trainer_lost(
                    f"process {self.index} waited {self.timeout:g} s for {whom} {where}; if a probe (`evaluate`) or a "
                    "fit takes that long, set the trainer's ddp_timeout higher"
                ) from error
            raise trainer_lost(
                f"process {self.index} lost the others {where}: one of them has ended, and its own output says why; "
                "resume from the last checkpoint"
            ) from error


def everywhere(
    method: Callable[Concatenate[Owner, Arguments], Answer],
) -> Callable[Concatenate[Owner, Arguments], Answer]:
    """Mark a method that every process of a run takes part in: called in process 0, it runs in all of them.

    Its object has ``processes``, None in a run of one process, and is registered there. Arguments are pickled.
    """

    @functools.wraps(method)
    def call(owner: Owner, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
        processes: Processes | None = owner.processes  # type: ignore[attr-defined]
        if processes is None:
            return method(owner, *arguments, **named)
        return processes.call(owner, method, *arguments, **named)

    return call


def as_ours(error: BaseException) -> NextCoreError:
    """Return an error as one that the other processes can unpickle and raise: of a class of ours.

    The constructor is not called: a class of ours may want more than a message.
    """
    if not isinstance(error, NextCoreError):
        return trainer_failed(f"process 0 failed: {describe(error)}")
    ours: Any = next(cls for cls in type(error).__mro__ if cls.__module__ == NextCoreError.__module__)
    copy: NextCoreError = ours.__new__(ours, error.message)
    copy.message, copy.kind, copy.exit_code = error.message, error.kind, error.exit_code
    return copy
