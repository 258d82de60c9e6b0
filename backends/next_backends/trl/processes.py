"""Communication between the processes of a data-parallel run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from next_core.errors import BackendError, NextCoreError, describe

Answer = TypeVar("Answer")


class Processes:
    """This process among the ``count`` processes of a run. Every method is called by all of them at the same point.

    They talk over a gloo group of their own: waiting for a long probe keeps no GPU busy and none of the trainer's
    collectives open. Tensors on a GPU go over the trainer's group. A process that waits longer than ``timeout``
    seconds, or whose peer is gone, raises ``BackendError``.
    """

    def __init__(self, index: int, count: int, timeout: float) -> None:
        self.index, self.count, self.timeout = index, count, timeout
        with self._waiting("when training began"):
            self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def first(self, where: str, act: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call ``act`` in process 0 while the others wait. All return what it returned, or raise what it raised.

        An error of ours keeps its class; any other becomes a ``BackendError`` in the other processes.
        """
        if self.leads:
            try:
                answer = act(*arguments)
            except BaseException as error:
                with contextlib.suppress(Exception):  # the error itself matters more
                    self._broadcast(as_ours(error), where)
                raise
            self._broadcast(answer, where)
            return answer
        received: Answer = self._broadcast(None, where)
        if isinstance(received, NextCoreError):
            raise received
        return received

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

    def broadcast_tensors(self, tensors: list[Tensor], where: str) -> None:
        """Overwrite the tensors of every process with those of process 0."""
        with self._waiting(where):
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

    def _broadcast(self, message: Any, where: str) -> Any:
        """Return process 0's message; that of any other process is ignored."""
        box = [message]
        with self._waiting(where, "the others" if self.leads else "process 0"):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

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
