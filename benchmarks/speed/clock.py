"""Seconds and memory of one piece of work: CPU and wall, in a process of its own that did nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.speed.machine import GIB

POLL_S = 0.005


@dataclass(frozen=True)
class Cost:
    """CPU-seconds (child processes included) and wall seconds of one run."""

    cpu: float
    wall: float


def cost_of(action: Callable[[], Any]) -> tuple[Cost, Any]:
    """What one call costs, and what it returned."""
    cpu, wall = _cpu(), time.perf_counter()
    result = action()
    return Cost(_cpu() - cpu, time.perf_counter() - wall), result


def best_of(repeats: int, action: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """The run with the fewest CPU-seconds, as a row of results, beside those of all runs; and its result."""
    costs, result = [], None
    for _ in range(repeats):
        result = None  # the one before must not count in this one's memory
        gc.collect()
        cost, result = cost_of(action)
        costs.append(cost)
    best = min(costs, key=lambda cost: cost.cpu)
    row = {"cpu_s": _round(best.cpu), "wall_s": _round(best.wall)}
    return row | {"runs_cpu_s": [_round(cost.cpu) for cost in costs]}, result


def cold(folder: Path, action: Callable[[], Any], warm: dict[str, Any]) -> dict[str, float]:
    """What one call costs when no file of a folder is in the page cache, beside what it cost just before."""
    gc.collect()  # a file that is still mapped stays in the cache
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    cost, _ = cost_of(action)
    return {"cpu_s": _round(cost.cpu), "wall_s": _round(cost.wall), "warm_cpu_s": warm["cpu_s"]}


def _round(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def apart(function: Callable[..., Any], *args: Any, fresh: bool = True) -> tuple[Any, dict[str, float]]:
    """``function(*args)`` in a fresh process, and the most memory of its own that it ever held.

    Own memory is RssAnon of that process and its children: what it allocated, without the files it has mapped, whose
    pages are the page cache's and can be dropped. It is read from outside every 5 ms, so that watching costs the
    process nothing. The interpreter with torch and next-core imported is in it; ``imports_gib`` says how much that is.
    With ``fresh=False`` it is called right here and no memory is reported.
    """
    if not fresh:
        return function(*args), {}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function, args))
    process.start()
    theirs.close()
    peak = 0
    try:
        while not ours.poll(POLL_S):
            peak = max(peak, own_bytes(process.pid))
        imports, error, result = ours.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"{function.__name__} died with exit code {process.exitcode}: out of memory?") from None
    except BaseException:
        process.terminate()
        raise
    process.join()
    if error is not None:
        raise ChildProcessError(f"{function.__name__} failed:\n{error}")
    return result, {"own_gib": round(max(peak, imports) / GIB, 3), "imports_gib": round(imports / GIB, 3)}


def peak_of(command: list[str]) -> tuple[str, float]:
    """What a program prints, and the most memory of its own in GiB that it ever held."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, own_bytes(process.pid))
            time.sleep(POLL_S)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise ChildProcessError(f"{command[0]} ended with exit code {process.returncode}")
    return printed, round(peak / GIB, 3)


def _work(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    import next_core.history.history
    import next_core.plugins

    torch.set_num_threads(1)
    next_core.plugins.registry()
    before = own_bytes(multiprocessing.current_process().pid)
    try:
        pipe.send((before, None, function(*args)))
    except BaseException:
        pipe.send((before, traceback.format_exc(), None))


def own_bytes(pid: int | None) -> int:
    """RssAnon of a process and its descendants; 0 for one that has ended."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += 1024 * int(line.split()[1])
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(own_bytes(int(child)) for child in children.read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total
