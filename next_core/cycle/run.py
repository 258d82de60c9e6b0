"""Run a config: start its trainer, drive it by the cycle, add the plain run for comparison, write the result."""

import contextlib
import datetime
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from next_core.backend import Backend
from next_core.config import dump_yaml
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.journal_advice import Advise, journal_advice
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.measurements import CURVE, Measurements
from next_core.cycle.plain_run import plain_run
from next_core.cycle.run_result import RESULT, RunResult, read_result
from next_core.cycle.scaling import scaling_records
from next_core.cycle.signals import Signals
from next_core.cycle.trainer_errors import closed_after_an_error, report_progress, start_trainer, trainer_errors
from next_core.errors import ConfigError, Interrupted, describe
from next_core.plugins import make_chosen
from next_core.predictor import described
from next_core.process.hardware import hardware, versions
from next_core.run_config import RunConfig
from next_core.storage.atomic import check_can_be_folder, fresh_directory, recover, sweep, write_text
from next_core.storage.json_lines import json_text
from next_core.storage.locking import locked
from next_core.storage.reading import read_text
from next_core.types import Progress

CONFIG = "config.yaml"
RUNNING = "RL with next-core"  # The name of a run's progress
MILESTONES = ("start", "before_jump", "after_jump", "final")


@dataclass(frozen=True)
class _Job:
    """The arguments of ``run``."""

    config: RunConfig
    out: Path
    strict: bool
    progress: Progress | None
    signals: Signals
    advise: Advise | None

    def write(self, result: RunResult) -> None:
        write_text(self.out / RESULT, json_text(result.as_dict()) + "\n")


def run(
    config: RunConfig,
    out: Path,
    *,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
    signals: Signals | None = None,
    advise: Advise | None = None,
) -> RunResult:
    """Train with jumps (and, for ``control: plain``, once more without), and write ``result.json``.

    If ``out`` holds this run already, it is resumed from the last complete checkpoint; a finished run is not repeated.
    Raises ``Interrupted`` when ``signals`` ended it, ``ConfigError`` for a folder that holds something else or is in
    use.
    """
    job = _Job(config, out, strict, progress, signals or Signals(), advise)
    check_can_be_folder(out)
    with locked(out):
        recover(out, CONFIG)
        sweep(out)
        begun = check_folder(out, config, overwrite)
        result = read_result(out) if begun and (out / RESULT).exists() else _train(job, begun)
        if config.control == "plain" and result.control is None:
            started = time.perf_counter()
            result.control = plain_run(config, out / "control", progress)
            result.seconds["total"] += time.perf_counter() - started
            job.write(result)
    return result


def check_folder(out: Path, config: RunConfig, overwrite: bool = False) -> bool:
    """Return whether ``out`` holds this run, begun or finished. Raises ``ConfigError`` if it holds anything else."""
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / CONFIG).exists():
        raise ConfigError(
            f"{out} is not empty and holds no run (it has no {CONFIG}); choose another --out",
            kind="config-folder-not-empty",
        )
    if overwrite:
        return False
    try:
        there = read_text(out / CONFIG)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{out / CONFIG} cannot be read ({describe(error)}); choose another --out", kind="config-other-run"
        ) from None
    if there != dump_yaml(config):
        raise ConfigError(
            f"{out} holds a run of another config ({_difference(there, dump_yaml(config))}); use the config it began "
            "with, choose another --out, or pass --overwrite to delete that run",
            kind="config-other-run",
        )
    return True


def _difference(there: str, here: str) -> str:
    """Return the first line in which two configs differ."""
    pairs = zip_longest(there.splitlines(), here.splitlines(), fillvalue="nothing")
    one, other = next(((one.strip(), other.strip()) for one, other in pairs if one != other), ("", ""))
    return f"there '{one}', here '{other}'"


def _train(job: _Job, begun: bool) -> RunResult:
    """Run from the start, or from the last complete checkpoint, and write the result."""
    started = time.perf_counter()
    backend, start = _prepare(job, begun)
    with closed_after_an_error(backend):
        start_trainer(backend, job.out, job.progress)
        setup = time.perf_counter() - started
        result = _train_with_jumps(job, backend, start or None)
    result.seconds |= {"setup": setup, "total": time.perf_counter() - started}
    job.write(result)  # closing the trainer may still fail
    with trainer_errors(job.out):
        backend.close()
    result.seconds["total"] = time.perf_counter() - started
    job.write(result)
    return result


def _prepare(job: _Job, begun: bool) -> tuple[Backend, int]:
    """Return a backend that is ready, and the step to resume at, 0 for a new run."""
    config, out = job.config, job.out
    backend: Backend = make_chosen("backend", config.backend)
    if begun:
        with closed_after_an_error(backend), trainer_errors(out):
            start = backend.prepare(config, out, True)
            if start:
                return backend, start
            if config.save_every is None:
                raise ConfigError(
                    f"{out} holds this run, which ended early and cannot be resumed: its config has no save_every; "
                    "pass --overwrite to start again, or choose another --out",
                    kind="config-other-run",
                )
            backend.close()  # the run was killed before its first save
        backend = make_chosen("backend", config.backend)
    # After an error the trainer is closed before its folder is removed: until then it may write there.
    with fresh_directory(out, CONFIG), closed_after_an_error(backend):
        write_text(out / CONFIG, dump_yaml(config))
        with trainer_errors(out.parent):
            backend.prepare(config, out)
    return backend, 0


def _train_with_jumps(job: _Job, backend: Backend, resumed_from: int | None) -> RunResult:
    """Run the cycle on a prepared backend, and measure it at its milestones."""
    config, out = job.config, job.out
    journal = Journal(out / JOURNAL)
    measure = Measurements(backend, journal, out, resumed_from or 0)
    cycle = PredictExtendCycle(
        backend,
        lambda: make_chosen("predictor", config.predictor),
        config.schedule,
        config.guards,
        config.steps,
        journal,
        rank=config.rank,
        compressor=None if config.compressor is None else make_chosen("compressor", config.compressor),
        executor=config.executor,
        strict=job.strict,
        progress=job.progress,
        milestone=measure,
        measure_every=config.measure_every,
        interrupted=lambda: job.signals.received is not None,
    )
    if resumed_from is not None:
        cycle.resume(resumed_from)
    else:
        predictor = described(make_chosen("predictor", config.predictor))
        journal.append("start", 0, steps=config.steps, seed=config.seed, predictor=predictor)
        measure("start", 0)
        if config.measure_every is not None:
            measure(CURVE, 0)
    measure.start()
    with trainer_errors(out), job.signals.patient() if backend.in_process else contextlib.nullcontext():
        last = cycle.run(on_step=lambda step: report_progress(job.progress, RUNNING, step, config.steps))
    if job.signals.received is not None and last < config.steps:
        raise Interrupted(
            f"{job.signals.name} stopped the run after step {last} of {config.steps}; its state is saved in {out}: run "
            "the same command again to resume",
            job.signals.received,
        )
    training = measure.training
    advice = _conclude(job, cycle, measure)
    ours = sum(cycle.seconds.values())
    return RunResult(
        steps=config.steps,
        seconds={
            "rl": training - ours,
            "ours": ours,
            **{f"ours_{what}": seconds for what, seconds in cycle.seconds.items()},
            "measuring": measure.measuring,
        },
        accuracy={**dict.fromkeys(MILESTONES), **measure.accuracy},
        jumps=journal.jumps(),
        scaling=scaling_records(journal),
        folder=str(out),
        resumed_from=resumed_from,
        settings={"predictor": config.predictor.name, "seed": config.seed, "algorithm": config.training.algorithm},
        date=datetime.date.today().isoformat(),
        hardware=hardware(),
        versions=versions(),
        notes=list(backend.notes),
        average=next((record for record in journal.counted() if record["event"] == "average"), None),
        advice=advice,
        curve=measure.curve,
    )


def _conclude(job: _Job, cycle: PredictExtendCycle, measure: Measurements) -> str | None:
    """Make the last measurements and return the advice; skip what a run killed at its end has journalled already."""
    steps, journal = job.config.steps, cycle.journal
    last: list[dict[str, Any]] = [record for record in journal.counted() if record["step"] == steps]
    known = {record.get("milestone", record["event"]): record for record in last}
    if job.config.measure_every is not None and CURVE not in known:
        measure(CURVE, steps)
    if "final" not in known:
        measure("final", steps)
    advice = known["advice"].get("text") if "advice" in known else journal_advice(cycle, job.advise, steps)
    if "end" not in known:
        journal.append("end", steps)
    return advice
