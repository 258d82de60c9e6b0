"""Runs what a comparison lacks, in worker processes; what is done is kept, so that the same command goes on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from next_core.comparison.config import Arm, CompareConfig
from next_core.comparison.races import Plan, Race, Trunk, make_plan
from next_core.comparison.results import Comparison, collect
from next_core.config import RunConfig, dump_yaml
from next_core.cycle.journal import JOURNAL, read_journal
from next_core.cycle.run import CONFIG, CURVE, ERROR_LOG, RESULT, RUNNING, run
from next_core.errors import BackendError, CheckpointError, ConfigError, NextCoreError
from next_core.interfaces import Progress
from next_core.plugins import describe
from next_core.storage import json_text, remove_directory, write_text

COMPARISON = "comparison.json"
"""The resolved config, by which a later call knows its own folder."""
COMPARE = "compare.json"
LEFT = frozenset({CONFIG, RESULT, JOURNAL, ERROR_LOG, "metrics.jsonl"})
"""What is kept of a race that is over: checkpoints are not, unless asked for."""
WHAT = "races"


def check_folder(out: Path, config: CompareConfig, overwrite: bool) -> None:
    """Whether ``out`` can be used. Raises ``ConfigError``; changes nothing."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names the comparison's folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / COMPARISON).exists():
        raise ConfigError(f"{out} is not empty, and no comparison; choose another --out")
    if not overwrite and (out / COMPARISON).read_text(encoding="utf-8") != _described(config):
        raise ConfigError(
            f"{out} holds a comparison of another config; choose another --out, or pass --overwrite to lose its races"
        )


def compare(
    config: CompareConfig,
    arms: Sequence[Arm],
    out: Path,
    *,
    overwrite: bool = False,
    workers: int = 1,
    keep_checkpoints: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run every race that ``out`` lacks, and judge them; ``compare.json`` is written there.

    Raises ``ConfigError`` for a folder of something else, and ``BackendError`` naming the races that failed, once all
    others are over.
    """
    check_folder(out, config, overwrite)
    if overwrite and out.exists():
        remove_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / COMPARISON, _described(config))
    plan = make_plan(config, arms)
    missing = [race for race in plan.races if not (out / race.folder / RESULT).exists()]
    if missing:
        failed = _execute(plan, missing, out, workers, keep_checkpoints, progress)
        if failed:
            raise BackendError(
                f"{len(failed)} of {len(plan.races)} races failed; the same command goes on with what is missing.\n"
                + "\n".join(f"{title}: {reason}" for title, reason in failed.items())
            )
    for race in plan.races:
        _prune(out / race.folder, keep_checkpoints)
    if not keep_checkpoints and (out / "trunks").exists():
        remove_directory(out / "trunks")
    found = collect(config, arms, {race.folder: _result(out / race.folder) for race in plan.races}, plan)
    write_text(out / COMPARE, json_text(found.as_dict()) + "\n")
    return found


def _described(config: CompareConfig) -> str:
    return json_text(config.model_dump(mode="json")) + "\n"


def _result(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        _ = found["curve"], found["accuracy"], found["seconds"], found["jumps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / RESULT} is damaged ({describe(error)}); remove {folder} and run the same command again"
        ) from None
    return found


def _execute(
    plan: Plan, missing: list[Race], out: Path, workers: int, keep: bool, progress: Progress | None
) -> dict[str, str]:
    """All that is missing; the reasons of those that failed, by title."""
    lacking = {race.folder for race in missing}
    done, total = len(plan.races) - len(missing), len(plan.races)
    failed: dict[str, str] = {}

    def told(title: str, error: BaseException | None) -> None:
        nonlocal done
        done += 1
        if error is not None:
            failed[title] = str(error) if isinstance(error, NextCoreError) else describe(error)
        if progress is not None:
            progress(WHAT, done, total)

    trunks = [trunk for trunk in plan.trunks if any(race.folder in lacking for race in _all(trunk))]
    alone = [race for race in plan.alone if race.folder in lacking]
    with _pool(workers) as (pool, told_by_races):
        waiting: dict[Future[None], Trunk | Race] = {}
        for trunk in trunks:
            wanted = {race.begins for race in trunk.races if race.folder in lacking}
            whole = trunk.plain is not None and trunk.plain.folder in lacking
            waiting[pool.submit(run_trunk, trunk, wanted, whole, out, keep)] = trunk
        for race in alone:
            waiting[pool.submit(run_race, race, out, None, keep)] = race
        while waiting:
            ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            while progress is not None and not told_by_races.empty():
                progress(*told_by_races.get())
            for future in ended:
                what, error = waiting.pop(future), future.exception()
                if isinstance(error, KeyboardInterrupt):
                    raise error
                if isinstance(what, Race):
                    told(what.title, error)
                    continue
                if what.plain is not None and what.plain.folder in lacking:
                    told(what.plain.title, error)
                for race in (race for race in what.races if race.folder in lacking):
                    if error is not None:
                        told(race.title, error)
                        continue
                    waiting[pool.submit(run_race, race, out, what.folder, keep)] = race
    return failed


def _all(trunk: Trunk) -> Iterable[Race]:
    return trunk.races if trunk.plain is None else (trunk.plain, *trunk.races)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Fresh processes, and the queue of what they tell: a forked one would inherit threads and random states."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _begin_worker, (workers, list(sys.path), told)) as pool:
        try:
            yield pool, told
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


_told: Any = None
"""In a worker: where its races tell of their steps."""


def _begin_worker(workers: int, path: list[str], told: Any) -> None:
    global _told
    _told = told
    import torch

    from next_core.quiet import quiet_libraries

    sys.path[:] = path  # where rewards lie
    quiet_libraries()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _tell(title: str) -> Progress:
    """Every race as one bar, which moves at most once a second."""
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if _told is not None and (done in (0, total) or time.monotonic() - last > 1) and what == RUNNING:
            last = time.monotonic()
            _told.put((title, done, total))

    return progress


def run_trunk(trunk: Trunk, wanted: set[int], whole: bool, out: Path, keep: bool) -> None:
    """Run a trunk as far as it is needed, leaving a copy of the run at each step where a race branches off.

    A trunk that was interrupted goes on from its newest copy.
    """
    place, progress = out / trunk.folder, _tell(f"what several share, seed {trunk.config.seed}")
    last = trunk.stops[-1] if whole else max(wanted)
    for stop in (stop for stop in trunk.stops if stop <= last):
        if _branch(place, stop).exists():
            continue
        before = [earlier for earlier in trunk.stops if earlier < stop]
        config = trunk.segment(stop)
        running = place / "running"
        remove_directory(running) if running.exists() else None
        if before:
            _copy(_branch(place, before[-1]), running, config, before[-1])
            run(config, running, resume=True, progress=progress)
        else:
            run(config, running, progress=progress)
        running.rename(_branch(place, stop))
    if whole and trunk.plain is not None:
        target = out / trunk.plain.folder
        remove_directory(target) if target.exists() else None
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(_branch(place, trunk.stops[-1]), target.parent / f".{target.name}")
        (target.parent / f".{target.name}").rename(target)
        _prune(target, keep)


def run_race(race: Race, out: Path, trunk: str | None, keep: bool) -> None:
    """One race, from its trunk's copy if it has one. What an interrupted call left is taken up where that can be."""
    folder, progress = out / race.folder, _tell(race.title)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _resumed(race.config, folder, progress):
        _prune(folder, keep)
        return
    if trunk is None:
        run(race.config, folder, overwrite=folder.exists(), progress=progress)
    else:
        remove_directory(folder) if folder.exists() else None
        _copy(_branch(out / trunk, race.begins), folder, race.config, race.begins)
        run(race.config, folder, resume=True, progress=progress)
    _prune(folder, keep)


def _resumed(config: RunConfig, folder: Path, progress: Progress) -> bool:
    """Go on with a race that was interrupted, where it has a complete checkpoint of the trainer."""
    if config.save_every is None or not (folder / CONFIG).exists():
        return False
    try:
        run(config, folder, resume=True, progress=progress)
    except (CheckpointError, ConfigError):
        return False
    return True


def _branch(place: Path, stop: int) -> Path:
    return place / f"step-{stop:06d}"


def _copy(source: Path, target: Path, config: RunConfig, step: int) -> None:
    """A run's folder as a run of another config, which has not gone beyond ``step`` and has not tried to jump."""
    scratch = target.parent / f".{target.name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, scratch)
    (scratch / RESULT).unlink(missing_ok=True)
    records = [record for record in read_journal(scratch / JOURNAL) if _holds(record, step)]
    write_text(scratch / JOURNAL, "".join(json_text(record) + "\n" for record in records))
    write_text(scratch / CONFIG, dump_yaml(config))
    scratch.rename(target)


def _holds(record: dict[str, Any], step: int) -> bool:
    """Whether a record of a trunk is the race's too: what was measured so far, and when."""
    if record["event"] == "accuracy":
        return bool(record["milestone"] == "start")
    return record["event"] in ("start", CURVE) and record["step"] <= step


def _prune(folder: Path, keep: bool) -> None:
    """Leave what is small and what a report reads."""
    for path in [] if keep else list(folder.iterdir()):
        if path.name not in LEFT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
