"""``python -m tests.fuzz``: read any number of damaged files; see ``--help``.

The seed, its kind and its number determine a case. One that fails is kept, and read again with ``--replay``.
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
from collections.abc import Iterable
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
    """Read a damaged file; return ``valid``, the class of our error, or ``FAULT`` with the traceback."""
    target = TARGETS[kind]
    path = folder / target.file
    path.write_bytes(data)
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(folder)
    except NextCoreError as error:
        named = path.name in error.message or str(folder) in error.message
        return type(error).__name__ if named else f"FAULT it names no file: {error}"
    except BaseException as error:  # anything else is a fault
        if isinstance(error, KeyboardInterrupt):
            raise
        return "FAULT " + "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "valid"


def fuzz(folder: Path, kinds: Iterable[str], cases: int, seed: int, keep: Path) -> dict[str, Counter[str]]:
    """Read damaged examples, each kind its share of the ``cases``; return the outcomes of each kind."""
    outcomes, path, share = {}, list(sys.path), sum(TARGETS[kind].share for kind in kinds)
    for kind in kinds:
        target, counts, slowest = TARGETS[kind], Counter[str](), 0.0
        whole = (folder / target.file).read_bytes()
        for number in range(max(1, round(cases * target.share / share))):
            data = target.mutate(Random(f"{seed} {kind} {number}"), whole)
            started = time.perf_counter()
            result = outcome(kind, folder, data)
            slowest = max(slowest, time.perf_counter() - started)
            sys.path[:] = path
            counts[result.split()[0]] += 1
            if result.startswith("FAULT"):
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{kind}.{seed}.{number}"
                kept.write_bytes(data)
                print(f"{result}\npython -m tests.fuzz --replay {kept}", file=sys.stderr)
        (folder / target.file).write_bytes(whole)
        listed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        print(f"{kind:16} {sum(counts.values()):6} cases, the slowest {slowest:5.2f} s: {listed}")
        outcomes[kind] = counts
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="number of all cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one kind of file")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for the cases that fail")
    parser.add_argument("--replay", type=Path, help="a case that was kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=SCRATCH if SCRATCH.is_dir() else None) as scratch:
        folder = fresh(Path(scratch) / "examples")
        for target in TARGETS.values():  # imports what readers import
            target.read(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        if given.replay is not None:
            result = outcome(given.replay.name.partition(".")[0], folder, given.replay.read_bytes())
            print(result)
            return int(result.startswith("FAULT"))
        outcomes = fuzz(folder, [given.only] if given.only else list(TARGETS), given.cases, given.seed, given.keep)
        gc.collect()  # mapped files, before their folder is removed
    faults = sum(counts["FAULT"] for counts in outcomes.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"seed {given.seed}: {faults} faults; peak memory {peak:.0f} MiB")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
