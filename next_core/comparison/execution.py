"""Runs what a comparison lacks, in worker processes. Finished runs are kept, so the same command resumes it."""

import contextlib
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from next_core.comparison.comparison_config import Arm, CompareConfig
from next_core.comparison.comparison_results import Comparison, collect
from next_core.comparison.races import Race, RacePlan, Trunk, make_plan
from next_core.config import dump_yaml
from next_core.cycle.journal import JOURNAL, read_journal
from next_core.cycle.measurements import CURVE
from next_core.cycle.run import CONFIG, RUNNING, run
from next_core.cycle.run_result import RESULT, read_result
from next_core.cycle.trainer_errors import ERROR_LOG
from next_core.diagnostics.learning_rate import run_advice
from next_core.errors import CheckpointError, ConfigError, describe, trainer_failed
from next_core.run_config import RunConfig
from next_core.storage.atomic import (
    check_can_be_folder,
    move_directory,
    new_directory,
    remove_directory,
    sweep,
    write_text,
)
from next_core.storage.json_lines import json_line, json_text
from next_core.storage.locking import locked
from next_core.storage.reading import read_text
from next_core.storage.yaml_files import parse_yaml
from next_core.types import Progress

COMPARISON = "comparison.json"  # The resolved config of the last call; its presence marks a comparison's folder
COMPARE = "compare.json"
ANY_SAVES = {"save_every": None}  # it decides no result, and may have been added for a trunk
Work = TypeVar("Work")
KEPT = frozenset({CONFIG, RESULT, JOURNAL, ERROR_LOG, "metrics.jsonl"})
"""What is kept of a finished run; checkpoints only if asked for."""


def check_folder(out: Path, plan: RacePlan, overwrite: bool) -> None:
    """Raise ``ConfigError`` unless ``out`` can be used; change nothing.

    Arms, seeds and values can be added to a comparison or taken away; a run that is there must have the same config.
    """
    check_can_be_folder(out)
    if not out.exists() or not any(not path.name.startswith(".") for path in out.iterdir()):
        return
    if not (out / COMPARISON).exists():
        message = f"{out} is not empty and holds no comparison; choose another --out"
        raise ConfigError(message, kind="config-folder-not-empty")
    for race in () if overwrite else plan.races:
        made = _config_of(out / race.folder)
        if made is not None and made != race.config.model_dump(mode="json") | ANY_SAVES:
            message = f"{out / race.folder} was run with another config; choose another --out"
            raise ConfigError(f"{message}, or pass --overwrite to delete all runs there", kind="config-other-run")


def is_done(race: Race, out: Path) -> bool:
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
    """Run every race that ``out`` lacks, judge all of them, and write ``compare.json`` there.

    A value that failed with some seed cannot be chosen. Raises ``ConfigError`` for a folder of something else, and,
    once all other races are finished, ``BackendError`` naming those that failed, if an arm has no complete variant.
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
        failed = _Execution(plan, out, keep_checkpoints, progress).run(workers)
        done = [race for race in plan.races if is_done(race, out)]
        _check_failures(failed, plan, done)
        for race in done:
            _prune(out / race.folder, keep_checkpoints)
        if not keep_checkpoints and not failed and (out / "trunks").exists():
            remove_directory(out / "trunks")
        results = {race.folder: read_result(out / race.folder).as_dict() for race in done}
        found = collect(config, arms, results, plan, failed)
        write_text(out / COMPARE, json_text(found.as_dict()) + "\n")
    return found


def _check_failures(failed: Mapping[str, str], plan: RacePlan, done: Sequence[Race]) -> None:
    """Raise ``BackendError`` unless every arm has a variant that finished with every seed."""
    variants = {(race.arm, race.variant) for race in plan.races}
    lacking = {(race.arm, race.variant) for race in plan.races if race not in done}
    if {arm for arm, _ in variants} > {arm for arm, _ in variants - lacking}:
        message = f"{len(failed)} of {len(plan.races)} runs failed; the same command retries them."
        reasons = [f"{title}: {reason}" for title, reason in failed.items()]
        raise trainer_failed("\n".join([message, *reasons]))


def _config_of(folder: Path) -> dict[str, Any] | None:
    """Return the config of a run on disk, finished or not; None where none can be read."""
    try:
        made = parse_yaml(read_text(folder / CONFIG), str(folder / CONFIG))
    except (OSError, ValueError, ConfigError):
        return None
    return made | ANY_SAVES if isinstance(made, dict) else None


class _Execution:
    """The races that a folder lacks, at work in a pool of processes: first the trunks, then what branches off."""

    def __init__(self, plan: RacePlan, out: Path, keep: bool, progress: Progress | None) -> None:
        self.plan, self.out, self.keep = plan, out, keep
        self.progress: Progress = progress or (lambda what, done, total: None)
        self.missing = [race for race in plan.races if not is_done(race, out)]
        self.done = len(plan.races) - len(self.missing)
        self.failed: dict[str, str] = {}

    def run(self, workers: int) -> dict[str, str]:
        """Run all that is missing. Returns why races failed, by title."""
        if not self.missing:
            return {}
        with _pool(workers) as (pool, reports):
            trunks = {}
            for trunk in self.plan.trunks:
                branches = [race for race in self.missing if race.trunk and race.trunk.folder == trunk.folder]
                if branches:
                    last = max(race.begins for race in branches)
                    trunks[_submit(pool, run_trunk, trunk, last, self.out)] = trunk, branches
            for (trunk, branches), error in self._ended(trunks, reports):
                for race in branches:
                    if not (self.out / trunk.copy(race.begins)).exists():
                        self._finish(race, error)
            ready = [race for race in self.missing if race.title not in self.failed]
            runs = {_submit(pool, run_race, race, self.out, self.keep): race for race in ready}
            for race, error in self._ended(runs, reports):
                self._finish(race, error)
        return self.failed

    def _ended(self, running: dict[Future[None], Work], reports: Any) -> Iterator[tuple[Work, BaseException | None]]:
        """Yield each task when it has ended, with its error."""
        while running:
            ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            while not reports.empty():  # unread, they would fill their pipe and stop the workers
                self.progress(*reports.get())
            for future in ended:
                error = future.exception()
                if isinstance(error, KeyboardInterrupt):
                    raise error
                yield running.pop(future), error

    def _finish(self, race: Race, error: BaseException | None) -> None:
        self.done += 1
        if isinstance(error, BrokenProcessPool):
            self.failed[race.title] = "a worker was killed, often for want of memory; try fewer --workers"
        elif error is not None:
            self.failed[race.title] = describe(error)
        self.progress("races", self.done, len(self.plan.races))


def _submit(pool: ProcessPoolExecutor, task: Callable[..., None], *arguments: Any) -> Future[None]:
    """Submit a task; where a worker was killed, which ends the pool, that is the task's error."""
    try:
        return pool.submit(task, *arguments)
    except BrokenProcessPool as error:
        broken: Future[None] = Future()
        broken.set_exception(error)
        return broken


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Start fresh processes and the queue of their reports: a fork would inherit threads and random states."""
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _begin_worker, (workers, list(sys.path), reports)) as pool:
        try:
            yield pool, reports
        except BaseException:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


_reports: Any = None  # In a worker: the queue of what its races report


def _begin_worker(workers: int, path: list[str], reports: Any) -> None:
    global _reports
    _reports = reports
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from next_core.process.quiet import quiet_libraries

    sys.path[:] = path  # a reward may be imported from there
    quiet_libraries()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _end_with_parent() -> None:
    """End this worker when its parent was killed: it would train next to the command's next call."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _report(title: str) -> Progress:
    """Return a progress that reports the steps of a race as one bar."""

    def progress(what: str, done: int, total: int) -> None:
        if _reports is not None and what == RUNNING:
            _reports.put((title, done, total))

    return progress


def run_trunk(trunk: Trunk, last: int, out: Path) -> None:
    """Run a trunk up to step ``last`` and keep a copy at each stop; an interrupted one resumes from its newest copy."""
    running, progress = out / trunk.folder / "running", _report(f"shared steps, seed {trunk.config.seed}")
    before = 0
    for stop in (stop for stop in trunk.stops if stop <= last):
        if not (out / trunk.copy(stop)).exists():
            config = trunk.segment(stop)
            if running.exists():
                remove_directory(running)
            if before:
                _branch_off(out / trunk.copy(before), running, config, before)
            run(config, running, progress=progress)
            move_directory(running, out / trunk.copy(stop))
        before = stop


def run_race(race: Race, out: Path, keep: bool) -> None:
    """Run one race, from its trunk's copy if it has one; resume what an interrupted call left, where it can be."""
    folder, progress = out / race.folder, _report(race.title)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not _resumed(race.config, folder, progress):
        if folder.exists():
            remove_directory(folder)
        if race.trunk is not None:
            _branch_off(out / race.trunk.copy(race.begins), folder, race.config, race.begins)
        run(race.config, folder, progress=progress, advise=run_advice)
    _prune(folder, keep)


def _resumed(config: RunConfig, folder: Path, progress: Progress) -> bool:
    """Resume a race that was interrupted, if it has a complete checkpoint of the trainer."""
    if config.save_every is None or not (folder / CONFIG).exists():
        return False
    try:
        run(config, folder, progress=progress, advise=run_advice)
    except (CheckpointError, ConfigError):
        return False
    return True


def _branch_off(source: Path, target: Path, config: RunConfig, step: int) -> None:
    """Copy a run's folder as that of a run with another config, which stands at ``step`` and has not tried to jump."""
    with new_directory(target, manifest=False) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        (scratch / RESULT).unlink(missing_ok=True)
        records = [record for record in read_journal(scratch / JOURNAL) if _is_common(record, step)]
        write_text(scratch / JOURNAL, b"".join(json_line(record) for record in records).decode())
        write_text(scratch / CONFIG, dump_yaml(config))


def _is_common(record: Mapping[str, Any], step: int) -> bool:
    """Whether a record of a trunk's journal belongs to the race too: what was measured so far."""
    if record["event"] == "accuracy":
        return bool(record["milestone"] == "start")
    return record["event"] in ("start", CURVE) and record["step"] <= step


def _prune(folder: Path, keep: bool) -> None:
    """Leave what is small and what a report reads."""
    for path in [] if keep else list(folder.iterdir()):
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
