"""``python -m tests.fuzz``: read any number of damaged files; see ``--help``.

The seed, its kind and its number determine a case.
"""

import argparse
import gc
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from types import FrameType

from next_core.errors import NextCoreError
from tests.fuzz.targets import TARGETS, write_examples

MEMORY = 2 * 2**30  # Bytes that reading may take beyond what the process has at the start
SECONDS = 10  # Of one core, for one case


class TooSlow(BaseException):
    """A case took longer than ``SECONDS``."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def outcome(kind: str, folder: Path, data: bytes) -> str:
    """Read a damaged file; return ``valid``, the class of our error, or ``FAULT`` with the traceback."""
    path = folder / TARGETS[kind].file
    path.write_bytes(data)
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        TARGETS[kind].read(path)
    except NextCoreError as error:
        named = path.name in error.message or str(folder) in error.message
        return type(error).__name__ if named else f"FAULT it names no file: {error}"
    except (Exception, SystemExit, TooSlow) as error:  # anything else is a fault
        return "FAULT " + "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "valid"


def fuzz(folder: Path, kinds: Iterable[str], cases: int, seed: int) -> dict[str, Counter[str]]:
    """Read damaged examples, each kind its share of the ``cases``; return the outcomes of each kind."""
    outcomes, path, share = {}, list(sys.path), sum(TARGETS[kind].share for kind in kinds)
    for kind in kinds:
        target, counts = TARGETS[kind], Counter[str]()
        whole = (folder / target.file).read_bytes()
        for number in range(max(1, round(cases * target.share / share))):
            data = target.mutate(Random(f"{seed} {kind} {number}"), whole)
            result = outcome(kind, folder, data)
            sys.path[:] = path
            counts[result.split()[0]] += 1
            if result.startswith("FAULT"):
                print(f"seed {seed}, {kind} {number}: {data!r}\n{result}", file=sys.stderr)
        (folder / target.file).write_bytes(whole)
        listed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        print(f"{kind:16} {sum(counts.values()):6} cases: {listed}")
        outcomes[kind] = counts
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="number of all cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one kind of file")
    given = parser.parse_args()
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None  # on a disk, half of the time would be spent there
    with tempfile.TemporaryDirectory(dir=shm) as scratch:
        folder = write_examples(Path(scratch) / "examples")
        for target in TARGETS.values():  # imports what readers import
            target.read(folder / target.file)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        outcomes = fuzz(folder, [given.only] if given.only else list(TARGETS), given.cases, given.seed)
        gc.collect()  # mapped files, before their folder is removed
    faults = sum(counts["FAULT"] for counts in outcomes.values())
    print(f"seed {given.seed}: {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
