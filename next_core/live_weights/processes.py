"""The processes of one run: process 0 decides, and the others carry out their part of what it does."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from next_core.errors import BackendError, NextCoreError, describe

Answer = TypeVar("Answer")
Owner = TypeVar("Owner")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class _Call:
    """What process 0 asks of the others: a method of the object that they hold under this name."""

    owner: str
    method: str
    arguments: tuple[Any, ...]


class Processes:
    """This process among the ``count`` processes of a run.

    Process 0 acts in ``lead``, and the others wait there. A method marked ``everywhere`` that it calls meanwhile runs
    in all of them, on the object of that class that each has registered.

    They talk over a gloo group of their own: waiting for a long probe keeps no GPU busy and none of the trainer's
    collectives open. Tensors on a GPU go over the trainer's group. A process that waits longer than ``timeout``
    seconds, or whose peer is gone, raises ``BackendError``.
    """

    def __init__(self, index: int, count: int, timeout: float) -> None:
        self.index, self.count, self.timeout = index, count, timeout
        self._owners: dict[str, Any] = {}
        self._where, self._acting = "when training began", False
        self._broken: BackendError | None = None
        with self._waiting(self._where):
            self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def register(self, owner: Any) -> None:
        """Make an object known whose methods process 0 may call everywhere; it replaces one of the same class."""
        self._owners[type(owner).__name__] = owner

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
                self._together(method, received.arguments)
            except BackendError as error:
                if error is not self._broken:  # otherwise process 0 says what becomes of the run
                    raise
        if isinstance(received, NextCoreError):
            raise received
        return cast(Answer, received)

    def call(self, owner: Any, method: Callable[..., Answer], arguments: tuple[Any, ...]) -> Answer:
        """Call a method of ``owner`` in every process, from process 0. Returns what it returned here.

        Raises what it raised here. If it failed in another process alone, the processes may differ: ``BackendError``
        is raised here and, whatever becomes of that, at the end of ``lead``.
        """
        own = functools.partial(method, owner)
        if self._acting or not self.leads:  # it was called as a part of another one
            return own(*arguments)
        self.share(_Call(type(owner).__name__, method.__name__, arguments))
        return self._together(own, arguments)

    def _together(self, method: Callable[..., Answer], arguments: tuple[Any, ...]) -> Answer:
        """Run this process's part of a call, and learn how the others fared."""
        self._acting, failed, answer = True, None, None
        try:
            answer = method(*arguments)
        except Exception as error:
            failed = error
        finally:
            self._acting = False
        problems = self.gather(None if failed is None else describe(failed), self._where)
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

    def barrier(self, where: str) -> None:
        """Wait until all processes are here."""
        self.gather(None, where)

    def gather(self, message: Any, where: str) -> list[Any]:
        """Return every process's message, in the order of the processes."""
        box: list[Any] = [None] * self.count
        with self._waiting(where):
            dist.all_gather_object(box, message, group=self._group)
        return box

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise ``BackendError`` where processes have different settings: they would act at different steps."""
        given = self.gather(dict(settings), "when training began")
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
                raise BackendError(
                    f"process {self.index} waited {self.timeout:g} s for {whom} {where}; if a probe (`evaluate`) or a "
                    "fit takes that long, set the trainer's ddp_timeout higher",
                    kind="backend-process-lost",
                ) from error
            raise BackendError(
                f"process {self.index} lost the others {where}: one of them has ended, and its own output says why; "
                "resume from the last checkpoint",
                kind="backend-process-lost",
            ) from error


def everywhere(
    method: Callable[Concatenate[Owner, Arguments], Answer],
) -> Callable[Concatenate[Owner, Arguments], Answer]:
    """Mark a method that every process of a run takes part in: called in process 0, it runs in all of them.

    Its object has ``processes``, None in a run of one process. It takes positional arguments that can be pickled.
    """

    @functools.wraps(method)
    def call(owner: Owner, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
        processes: Processes | None = owner.processes  # type: ignore[attr-defined]
        if processes is None:
            return method(owner, *arguments, **named)
        return processes.call(owner, method, arguments)

    return call


def as_ours(error: BaseException) -> NextCoreError:
    """Return an error as one that the other processes can unpickle and raise: of a class of ours.

    The constructor is not called: a class of ours may want more than a message.
    """
    if not isinstance(error, NextCoreError):
        return BackendError(f"process 0 failed: {describe(error)}", kind="backend-failed")
    ours: Any = next(cls for cls in type(error).__mro__ if cls.__module__ == NextCoreError.__module__)
    copy: NextCoreError = ours.__new__(ours, error.message)
    copy.message, copy.kind, copy.exit_code = error.message, error.kind, error.exit_code
    return copy
