"""Where the map over matrices runs: in this process, in a pool of processes, or as Ray tasks. The results are the same.

Each matrix is computed alone and in one thread, wherever that is: the bytes do not depend on the executor.
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
"""What is computed of one matrix, given its name; it must pickle for more than one process."""


class Executor(Settings):
    """``local`` with one worker computes in this process; with more, or with ``ray``, tasks are pickled to others."""

    name: Literal["local", "ray"] = Field("local", description="local: this machine; ray: a Ray cluster (extra `ray`)")
    workers: int = Field(1, ge=1, description="Processes at a time, one thread each")
    address: str | None = Field(None, description="ray: a cluster's address, or auto; none: a Ray of its own, here")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _address_is_rays(self) -> Executor:
        if self.address is not None and self.name != "ray":
            raise ValueError("address is of a Ray cluster: set name: ray")
        return self

    def map(self, task: Task[Result], names: Sequence[str]) -> Iterator[Result]:
        """task(name) of each name, in order, as they get done. Raises ``ConfigError`` without Ray."""
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
            # Not fork: a child of a process whose libraries hold threads may hang.
            context = multiprocessing.get_context("spawn")
            try:
                with ProcessPoolExecutor(self.workers, context, _begin, (task,)) as pool:
                    yield from pool.map(_run, names)
            except BrokenProcessPool as error:
                raise NextCoreError(f"a worker died ({error}); if memory ran out, take fewer workers") from None

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
                # No more than are at work: the results of a large model are not to pile up in the object store.
                value: Result = ray.get(waiting.pop(0))
                ahead = index + self.workers
                if ahead < len(names):
                    waiting.append(remote.remote(shared, names[ahead]))
                yield value
        except ray.exceptions.RayError as error:
            if isinstance(error, NextCoreError):
                raise
            raise NextCoreError(f"Ray failed: {error}; if memory ran out, take fewer workers") from error
        finally:
            if started:
                ray.shutdown()


_task: Task[Any]


def _begin(task: Task[Any]) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)


def _run(name: str) -> Any:
    return _task(name)


def _run_on_ray(task: Task[Result], name: str) -> Result:
    torch.set_num_threads(1)
    return task(name)


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"executor ray needs Ray ({error}); pip install next-core[ray], or use local") from None
