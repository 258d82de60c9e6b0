"""Map a task over matrices: in this process, in a pool of processes, or as Ray tasks.

Every matrix is computed alone in one thread, because the number of threads changes the order of sums: results agree
bit for bit between executors.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator

from next_core.errors import ConfigError, NextCoreError
from next_core.settings import Settings

Result = TypeVar("Result")
Task = Callable[[str], Result]
"""A computation of one matrix, given its name. It must pickle if there is more than one process."""


class Executor(Settings):
    """Where tasks run: ``local`` with one worker is this process; more workers, or ``ray``, are other processes."""

    name: Literal["local", "ray"] = Field("local", description="local: this machine; ray: a Ray cluster (extra `ray`)")
    workers: int = Field(1, ge=1, description="Number of processes, one thread each")
    address: str | None = Field(None, description="ray: a cluster's address, or auto; none: start a local Ray")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _address_is_rays(self) -> Executor:
        if self.address is not None and self.name != "ray":
            raise ValueError("address belongs to a Ray cluster; set name: ray")
        return self

    def map(self, task: Task[Result], names: Sequence[str]) -> Iterator[Result]:
        """Yield task(name) for each name, in order. Raises ``NextCoreError`` without Ray or for a crash."""
        if self.name == "ray":
            yield from self._map_ray(task, names)
        elif self.workers == 1 or len(names) < 2:
            for name in names:
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                try:
                    value = task(name)
                finally:
                    torch.set_num_threads(threads)
                yield value
        else:
            # Not fork: the child of a process whose libraries hold threads may hang.
            context = multiprocessing.get_context("spawn")
            try:
                with ProcessPoolExecutor(self.workers, context, _begin, (task,)) as pool:
                    yield from pool.map(_run, names)
            except BrokenProcessPool as error:
                message = f"a worker process died ({error}); if memory ran out, use fewer workers"
                raise NextCoreError(message, kind="executor-worker-died") from None

    def _map_ray(self, task: Task[Result], names: Sequence[str]) -> Iterator[Result]:
        ray = _ray()
        started = not ray.is_initialized()
        if started:
            local = {"num_cpus": self.workers, "include_dashboard": False} if self.address is None else {}
            ray.init(self.address or "local", log_to_driver=False, configure_logging=False, **local)
        try:
            shared = ray.put(task)
            remote = ray.remote(_run_on_ray)
            waiting = [remote.remote(shared, name) for name in names[: self.workers]]
            for index in range(len(names)):
                # At most one task per worker in flight: results of a large model would fill the object store.
                value: Result = ray.get(waiting.pop(0))
                ahead = index + self.workers
                if ahead < len(names):
                    waiting.append(remote.remote(shared, names[ahead]))
                yield value
        except ray.exceptions.RayError as error:
            if isinstance(error, NextCoreError):
                raise
            message = f"Ray failed: {error}; if memory ran out, use fewer workers"
            raise NextCoreError(message, kind="executor-worker-died") from error
        finally:
            if started:
                ray.shutdown()


_task: Task[Any]


def _begin(task: Task[Any]) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)


def _run(name: str) -> Any:
    return _task(name)


def _run_on_ray(task: Task[Result], name: str) -> Result:
    torch.set_num_threads(1)
    return task(name)


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about a change of its defaults
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        message = f"executor ray needs Ray ({error}); pip install next-core[ray], or use local"
        raise ConfigError(message, kind="config-missing-package") from None
