"""``python -m tests.fuzz``: damaged files, as many as asked for, through the readers; see ``--help``.

A case is decided by the seed, its kind and its number. One that fails is kept, and read again with ``--replay``.
"""

from __future__ import annotations

import argparse
import gc
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType

from next_core.errors import NextCoreError
from tests.fuzz.targets import TARGETS, fresh

MEMORY = 2 * 2**30
"""Bytes that reading may take beyond what the process has at the start."""
SCRATCH = Path("/dev/shm")
"""In memory: on a disk, half of the time would be spent there."""
SECONDS = 10
"""Of one core, for one case."""


class TooSlow(BaseException):
    """A case took longer than ``SECONDS``."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def outcome(kind: str, folder: Path, data: bytes) -> str:
    """What reading a damaged file came to: ``valid``, the class of our error, or ``FAULT`` and the traceback."""
    target = TARGETS[kind]
    path = folder / target.file
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(folder)
    except NextCoreError as error:
        named = path.name in str(error) or str(folder) in str(error)
        return type(error).__name__ if named else f"FAULT it names no file: {error}"
    except BaseException as error:  # whatever it is, it is a fault
        if isinstance(error, KeyboardInterrupt):
            raise
        return "FAULT " + "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "valid"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one kind of file")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for the cases that fail")
    parser.add_argument("--replay", type=Path, help="a case that was kept")
    given = parser.parse_args()
    signal.signal(signal.SIGPROF, _too_slow)
    with tempfile.TemporaryDirectory(dir=SCRATCH if SCRATCH.is_dir() else None) as scratch:
        folder = fresh(Path(scratch) / "examples")
        for target in TARGETS.values():  # imports what readers import
            target.read(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        if given.replay is not None:
            found = outcome(given.replay.name.partition(".")[0], folder, given.replay.read_bytes())
            print(found)
            return int(found.startswith("FAULT"))
        return _all(folder, given.cases, given.seed, given.only, given.keep)


def _all(folder: Path, cases: int, seed: int, only: str | None, keep: Path) -> int:
    faults, slowest = 0, 0.0
    path = list(sys.path)
    for kind, target in TARGETS.items():
        if only not in (None, kind):
            continue
        whole = (folder / target.file).read_bytes()
        counts: Counter[str] = Counter()
        began, share = time.perf_counter(), 1.0 if only else target.share
        for number in range(round(cases * share)):
            random = Random(f"{seed} {kind} {number}")
            data = target.mutate(random, whole)
            started = time.perf_counter()
            found = outcome(kind, folder, data)
            slowest = max(slowest, time.perf_counter() - started)
            sys.path[:] = path
            counts[found.split()[0]] += 1
            if found.startswith("FAULT"):
                faults += 1
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{kind}.{seed}.{number}"
                kept.write_bytes(data)
                print(f"{found}\npython -m tests.fuzz --replay {kept}", file=sys.stderr)
        (folder / target.file).write_bytes(whole)
        gc.collect()
        told = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        print(f"{kind:16} {sum(counts.values()):6} cases {time.perf_counter() - began:6.1f} s  {told}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"seed {seed}: {faults} faults; the slowest case {slowest:.2f} s; peak memory {peak:.0f} MiB")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
