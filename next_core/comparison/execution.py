"""Runs what a comparison lacks, in worker processes; what is done is kept, so that the same command goes on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from next_core.comparison.comparison_config import Arm, CompareConfig
from next_core.comparison.comparison_results import Comparison, collect
from next_core.comparison.races import Race, RacePlan, Trunk, make_plan
from next_core.config import dump_yaml
from next_core.cycle.journal import JOURNAL, read_journal
from next_core.cycle.measurements import CURVE
from next_core.cycle.run import CONFIG, RUNNING, run
from next_core.cycle.run_result import RESULT
from next_core.cycle.trainer_errors import ERROR_LOG
from next_core.diagnostics.learning_rate import run_advice
from next_core.errors import BackendError, CheckpointError, ConfigError, NextCoreError, describe
from next_core.run_config import RunConfig
from next_core.storage.atomic import move_directory, new_directory, remove_directory, sweep, write_text
from next_core.storage.json_lines import json_line, json_text
from next_core.storage.locking import locked
from next_core.storage.reading import LARGE, parse_json, read_bytes, read_text
from next_core.storage.yaml_files import parse_yaml
from next_core.types import Progress

COMPARISON = "comparison.json"
"""The resolved config of the last call; its presence tells a comparison's folder."""
COMPARE = "compare.json"
LEFT = frozenset({CONFIG, RESULT, JOURNAL, ERROR_LOG, "metrics.jsonl"})
"""What is kept of a race that is over: checkpoints are not, unless asked for."""
WHAT = "races"


def check_folder(out: Path, plan: RacePlan, overwrite: bool) -> None:
    """Whether ``out`` can be used. Raises ``ConfigError``; changes nothing.

    Arms, seeds and values can be added to a comparison, or taken away; a race that is there must be of the same config.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names the comparison's folder")
    if not out.exists() or not any(not path.name.startswith(".") for path in out.iterdir()):
        return
    if not (out / COMPARISON).exists():
        raise ConfigError(f"{out} is not empty, and no comparison; choose another --out")
    for race in () if overwrite else plan.races:
        made = _config_of(out / race.folder)
        if made is not None and made != _identity(race.config):
            raise ConfigError(
                f"{out / race.folder} was run with another config; choose another --out, or pass --overwrite to lose "
                "the races that are there"
            )


def is_done(race: Race, out: Path) -> bool:
    """Whether a race is over."""
    return (out / race.folder / RESULT).exists()


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

    A value that failed with some seed is left out of the choice where others are there. Raises ``ConfigError`` for a
    folder of something else, and ``BackendError`` naming the races that failed, once all others are over.
    """
    plan = make_plan(config, arms)
    check_folder(out, plan, overwrite)
    with locked(out):
        if overwrite and out.exists():
            remove_directory(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / COMPARISON, json_text(config.model_dump(mode="json")) + "\n")
        for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
            sweep(folder)
        missing = [race for race in plan.races if not is_done(race, out)]
        failed = _execute(plan, missing, out, workers, keep_checkpoints, progress) if missing else {}
        _check_failures(failed, plan, out)
        for race in plan.races:
            if is_done(race, out):
                _prune(out / race.folder, keep_checkpoints)
        if not keep_checkpoints and not failed and (out / "trunks").exists():
            remove_directory(out / "trunks")
        results = {race.folder: _result(out / race.folder) for race in plan.races if is_done(race, out)}
        found = collect(config, arms, results, plan, failed)
        write_text(out / COMPARE, json_text(found.as_dict()) + "\n")
    return found


def _check_failures(failed: dict[str, str], plan: RacePlan, out: Path) -> None:
    """Raise ``BackendError`` unless every arm has a variant that is complete."""
    lacking = {(race.arm, race.variant) for race in plan.races if not is_done(race, out)}
    run = {(race.arm, race.variant) for race in plan.races}
    whole = {arm for arm, variant in run - lacking}
    if {arm for arm, _ in run} - whole:
        raise BackendError(
            f"{len(failed)} of {len(plan.races)} races failed; the same command goes on with what is missing.\n"
            + "\n".join(f"{title}: {reason}" for title, reason in failed.items())
        )


def _identity(config: RunConfig) -> Any:
    """What decides the result of a run: whoever shares a prefix gets ``save_every`` for it."""
    return json.loads(config.model_copy(update={"save_every": None}).model_dump_json())


def _config_of(folder: Path) -> Any:
    """The same of a run that was made, or begun; None where there is none to read."""
    try:
        made = parse_yaml(read_text(folder / CONFIG), str(folder / CONFIG))
    except (OSError, ValueError, ConfigError):
        return None
    return made | {"save_every": None} if isinstance(made, dict) else None


def _result(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(read_bytes(folder / RESULT, LARGE))
        _ = found["curve"], found["accuracy"], found["seconds"], found["jumps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / RESULT} is damaged ({describe(error)}); remove {folder} and run the same command again"
        ) from None
    return found


def _execute(
    plan: RacePlan, missing: list[Race], out: Path, workers: int, keep: bool, progress: Progress | None
) -> dict[str, str]:
    """All that is missing; the reasons of those that failed, by title."""
    lacking = {race.folder for race in missing}
    done, total = len(plan.races) - len(missing), len(plan.races)
    failed: dict[str, str] = {}

    def told(title: str, error: BaseException | None) -> None:
        nonlocal done
        done += 1
        if isinstance(error, BrokenProcessPool):
            failed[title] = "a worker was killed, often for want of memory; try fewer --workers"
        elif error is not None:
            failed[title] = str(error) if isinstance(error, NextCoreError) else describe(error)
        if progress is not None:
            progress(WHAT, done, total)

    trunks = [trunk for trunk in plan.trunks if any(race.folder in lacking for race in trunk.serves)]
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
            _pass_on(told_by_races, progress)
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
                    if not _branch(out / what.folder, race.begins).exists():
                        told(race.title, error)
                        continue
                    try:
                        waiting[pool.submit(run_race, race, out, what.folder, keep)] = race
                    except BrokenProcessPool as broken:
                        told(race.title, broken)
    return failed


def _pass_on(messages: Any, progress: Progress | None) -> None:
    """What races told of themselves; unread, it would fill their pipe and stop them."""
    while not messages.empty():
        message = messages.get()
        if progress is not None:
            progress(*message)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Fresh processes, and the queue of what they tell: a forked one would inherit threads and random states."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _begin_worker, (workers, list(sys.path), told)) as pool:
        try:
            yield pool, told
        except BaseException:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


_told: Any = None
"""In a worker: where its races tell of their steps."""


def _begin_worker(workers: int, path: list[str], told: Any) -> None:
    global _told
    _told = told
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from next_core.process.quiet import quiet_libraries

    sys.path[:] = path  # where rewards lie
    quiet_libraries()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _end_with_parent() -> None:
    """A worker that outlived its comparison would train beside the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
        if running.exists():
            remove_directory(running)
        if before:
            _copy(_branch(place, before[-1]), running, config, before[-1])
        run(config, running, progress=progress, advise=run_advice)
        move_directory(running, _branch(place, stop))
    if whole and trunk.plain is not None:
        _keep_plain(trunk.plain, _branch(place, trunk.stops[-1]), out / trunk.plain.folder)
        _prune(out / trunk.plain.folder, keep)


def _keep_plain(race: Race, made: Path, folder: Path) -> None:
    """The trunk itself as the race that it is."""
    with new_directory(folder, overwrite=True, manifest=False) as scratch:
        shutil.copytree(made, scratch, dirs_exist_ok=True)
        write_text(scratch / CONFIG, dump_yaml(race.config))
        write_text(scratch / RESULT, json_text(_result(scratch) | {"folder": str(folder), "resumed_from": None}) + "\n")


def run_race(race: Race, out: Path, trunk: str | None, keep: bool) -> None:
    """One race, from its trunk's copy if it has one. What an interrupted call left is taken up where that can be."""
    folder, progress = out / race.folder, _tell(race.title)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not _resumed(race.config, folder, progress):
        if folder.exists():
            remove_directory(folder)
        if trunk is not None:
            _copy(_branch(out / trunk, race.begins), folder, race.config, race.begins)
        run(race.config, folder, progress=progress)
    _prune(folder, keep)


def _resumed(config: RunConfig, folder: Path, progress: Progress) -> bool:
    """Go on with a race that was interrupted, where it has a complete checkpoint of the trainer."""
    if config.save_every is None or not (folder / CONFIG).exists():
        return False
    try:
        run(config, folder, progress=progress, advise=run_advice)
    except (CheckpointError, ConfigError):
        return False
    return True


def _branch(place: Path, stop: int) -> Path:
    return place / f"step-{stop:06d}"


def _copy(source: Path, target: Path, config: RunConfig, step: int) -> None:
    """A run's folder as a run of another config, which has not gone beyond ``step`` and has not tried to jump."""
    with new_directory(target, manifest=False) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        (scratch / RESULT).unlink(missing_ok=True)
        records = [record for record in read_journal(scratch / JOURNAL) if _holds(record, step)]
        write_text(scratch / JOURNAL, b"".join(json_line(record) for record in records).decode())
        write_text(scratch / CONFIG, dump_yaml(config))


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
