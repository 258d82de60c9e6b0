"""One run from a config: a trainer, the cycle that drives it, a plain run beside it if asked for, and the result."""

from __future__ import annotations

import contextlib
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

from next_core.backend import Backend
from next_core.config import dump_yaml
from next_core.cycle.advice import Advise, journal_advice
from next_core.cycle.clock import Stopwatch, TrainingClock
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.plain_run import plain_run
from next_core.cycle.run_result import RESULT, RunResult, read_result
from next_core.cycle.signals import Signals
from next_core.cycle.trainer import accuracies, closed_after_an_error, start_trainer, tell, trainer_errors
from next_core.errors import ConfigError, Interrupted, describe
from next_core.plugins import make_chosen
from next_core.process.hardware import hardware, versions
from next_core.run_config import RunConfig
from next_core.storage.atomic import fresh_directory, recover, sweep, write_text
from next_core.storage.json_lines import json_text
from next_core.storage.locking import locked
from next_core.storage.reading import read_text
from next_core.types import Progress

CONFIG = "config.yaml"
RUNNING = "RL with jumps"
"""What a run's progress is called."""
CURVE = "curve"
"""Event of a journal record with accuracies along the run, and the milestone that asks for them."""


def check_folder(out: Path, config: RunConfig, overwrite: bool = False) -> bool:
    """Whether ``out`` holds this run, begun or finished. Raises ``ConfigError`` for anything else; changes nothing."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names the run's folder")
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / CONFIG).exists():
        raise ConfigError(f"{out} is not empty, and no run (it has no {CONFIG}); choose another --out")
    if overwrite:
        return False
    try:
        there = read_text(out / CONFIG)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / CONFIG} cannot be read ({describe(error)}); choose another --out") from None
    if there != dump_yaml(config):
        raise ConfigError(
            f"{out} holds a run of another config ({_difference(there, dump_yaml(config))}); go on with the config it "
            "began with, choose another --out, or pass --overwrite to lose that run"
        )
    return True


def _difference(there: str, here: str) -> str:
    """The first line that tells two configs apart."""
    pairs = zip_longest(there.splitlines(), here.splitlines(), fillvalue="nothing")
    one, other = next(((one.strip(), other.strip()) for one, other in pairs if one != other), ("", ""))
    return f"there '{one}', here '{other}'"


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

    Where ``out`` holds this run already, it goes on from the last checkpoint that is whole, and a finished one is not
    run again. Raises ``Interrupted`` when ``signals`` ended it, ``ConfigError`` for a folder of something else or one
    in use.
    """
    with locked(out):
        recover(out, CONFIG)
        sweep(out)
        begun = check_folder(out, config, overwrite)
        if begun and (out / RESULT).exists():
            result = read_result(out)
        else:
            result = _trained(config, out, begun, strict, progress, signals or Signals(), advise)
        if config.control == "plain" and result.control is None:
            started = time.perf_counter()
            result.control = plain_run(config, out / "control", progress)
            result.seconds["total"] += time.perf_counter() - started
            write_text(out / RESULT, json_text(result.as_dict()) + "\n")
    return result


def _trained(
    config: RunConfig,
    out: Path,
    begun: bool,
    strict: bool,
    progress: Progress | None,
    signals: Signals,
    advise: Advise | None,
) -> RunResult:
    """The run itself, from its start or from the last checkpoint that is whole; its result is on disk at the end."""
    started = time.perf_counter()
    backend, start = _prepared(config, out, begun)
    with closed_after_an_error(backend):
        start_trainer(backend, out, progress)
        setup = time.perf_counter() - started
        result = _with_jumps(backend, config, out, start or None, strict, progress, signals, advise)
    result.seconds |= {"setup": setup, "total": time.perf_counter() - started}
    write_text(out / RESULT, json_text(result.as_dict()) + "\n")  # what follows may still fail
    with trainer_errors(out):
        backend.close()
    result.seconds["total"] = time.perf_counter() - started
    write_text(out / RESULT, json_text(result.as_dict()) + "\n")
    return result


def _prepared(config: RunConfig, out: Path, begun: bool) -> tuple[Backend, int]:
    """A backend that is ready, and the step to go on from."""
    backend: Backend = make_chosen("backend", config.backend)
    if begun:
        with closed_after_an_error(backend), trainer_errors(out):
            start = backend.prepare(config, out, True)
            if start:
                return backend, start
            if config.save_every is None:
                raise ConfigError(
                    f"{out} holds this run, which was ended before its end, and nothing to go on from: its config has "
                    "no save_every; pass --overwrite to start again, or choose another --out"
                )
            backend.close()  # killed before anything was saved
        backend = make_chosen("backend", config.backend)
    # Ended before its folder goes: until then it may write there.
    with fresh_directory(out, CONFIG), closed_after_an_error(backend):
        write_text(out / CONFIG, dump_yaml(config))
        with trainer_errors(out.parent):
            backend.prepare(config, out)
    return backend, 0


def _with_jumps(
    backend: Backend,
    config: RunConfig,
    out: Path,
    resumed_from: int | None,
    strict: bool,
    progress: Progress | None,
    signals: Signals,
    advise: Advise | None,
) -> RunResult:
    """The cycle on a backend that is prepared, measured at its milestones."""
    accuracy: dict[str, float | None] = {"start": None, "before_jump": None, "after_jump": None, "final": None}
    measuring = Stopwatch()
    journal = Journal(out / JOURNAL)
    earlier = [r for r in journal.counted() if r["event"] == CURVE and r["step"] <= (resumed_from or 0)]
    clock = TrainingClock(measuring, earlier[-1]["seconds"] if earlier else 0.0)

    def measure(milestone: str, step: int) -> None:
        if milestone == CURVE:
            seconds = clock.seconds
            with measuring, trainer_errors(out):
                journal.append(CURVE, step, seconds=seconds, **accuracies(backend))
            return
        with measuring, trainer_errors(out):
            accuracy[milestone] = backend.evaluate("test")
        journal.append("accuracy", step, milestone=milestone, value=accuracy[milestone])

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
        strict=strict,
        progress=progress,
        milestone=measure,
        measure_every=config.measure_every,
        interrupted=lambda: signals.received is not None,
    )
    if resumed_from is not None:
        cycle.resume(resumed_from)
    else:
        journal.append("start", 0, steps=config.steps, seed=config.seed)
        measure("start", 0)
        if config.measure_every is not None:
            measure(CURVE, 0)
    clock.start()
    with trainer_errors(out), signals.patient() if backend.in_process else contextlib.nullcontext():
        ended = cycle.run(on_step=lambda step: tell(progress, RUNNING, step, config.steps))
    if signals.received is not None and ended < config.steps:
        raise Interrupted(
            f"{signals.name} ended the run after step {ended} of {config.steps}, with its state saved in {out}; the "
            "same command goes on",
            signals.received,
        )
    training = clock.stop()
    # A run that was killed past its last checkpoint has said some of this already.
    said = {record.get("milestone", record["event"]): record for record in _counted_at(journal, config.steps)}
    if config.measure_every is not None and CURVE not in said:
        measure(CURVE, config.steps)
    if "final" not in said:
        measure("final", config.steps)
    advice = said["advice"].get("text") if "advice" in said else journal_advice(advise, backend, journal, config.steps)
    if "end" not in said:
        journal.append("end", config.steps)
    # A resumed run finds in the journal what it measured before.
    accuracy |= {r["milestone"]: r["value"] for r in journal.counted() if r["event"] == "accuracy"}
    ours = sum(cycle.seconds.values())
    return RunResult(
        steps=config.steps,
        seconds={
            "rl": training - ours,
            "ours": ours,
            **{f"ours_{what}": seconds for what, seconds in cycle.seconds.items()},
            "measuring": measuring.seconds,
        },
        accuracy=accuracy,
        jumps=journal.jumps(),
        folder=str(out),
        resumed_from=resumed_from,
        settings={"predictor": config.predictor.name, "seed": config.seed, "algorithm": config.training.algorithm},
        hardware=hardware(),
        versions=versions(),
        notes=list(backend.notes),
        average=next((record for record in journal.counted() if record["event"] == "average"), None),
        advice=advice,
        curve=[_point(record) for record in journal.counted() if record["event"] == CURVE],
    )


def _counted_at(journal: Journal, step: int) -> list[dict[str, Any]]:
    return [record for record in journal.counted() if record["step"] == step]


def _point(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("step", "seconds", "validation", "test")}
