"""One run from a config: a trainer, the cycle that drives it, a plain run beside it if asked for, and the result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from next_core.config import RunConfig, dump_yaml
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.signals import Signals
from next_core.errors import BackendError, CheckpointError, ConfigError, Interrupted, NextCoreError, StorageError
from next_core.interfaces import Backend, Progress
from next_core.json_lines import json_text
from next_core.locking import locked
from next_core.plugins import describe
from next_core.storage import fresh_directory, is_full, recover, write_text

CONFIG = "config.yaml"
RESULT = "result.json"
ERROR_LOG = "error.log"
RUNNING = "RL with jumps"
"""What a run's progress is called."""
CURVE = "curve"
"""Event of a journal record with accuracies along the run, and the milestone that asks for them."""


@dataclass
class RunResult:
    """What a run did. Accuracies are of the test prompts; ``before_jump`` and ``after_jump`` of the first jump made.

    ``average``: what came of the mean at the end, with ``before_average`` beside the accuracies; None where none was
    asked for.
    """

    steps: int
    seconds: dict[str, float]
    accuracy: dict[str, float | None]
    jumps: list[dict[str, Any]]
    folder: str
    control: dict[str, Any] | None = None
    resumed_from: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    average: dict[str, Any] | None = None
    advice: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    """With ``measure_every``: step, seconds of training so far (measuring left out), accuracies by split and kind."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


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
    if (there := (out / CONFIG).read_text(encoding="utf-8", errors="replace")) != dump_yaml(config):
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
) -> RunResult:
    """Train with jumps (and, for ``control: plain``, once more without), and write ``result.json``.

    Where ``out`` holds this run already, it goes on from the last checkpoint that is whole, and a finished one is not
    run again. Raises ``Interrupted`` when ``signals`` ended it, ``ConfigError`` for a folder of something else or one
    in use.
    """
    with locked(out):
        recover(out, CONFIG)
        begun = check_folder(out, config, overwrite)
        if begun and (out / RESULT).exists():
            result = read_result(out)
        else:
            result = _trained(config, out, begun, strict, progress, signals or Signals())
        if config.control == "plain" and result.control is None:
            started = time.perf_counter()
            result.control = _plain(config, out / "control", progress)
            result.seconds["total"] += time.perf_counter() - started
            write_text(out / RESULT, json_text(result.as_dict()) + "\n")
    return result


def read_result(out: Path) -> RunResult:
    """The result of a finished run. Raises ``CheckpointError`` for a damaged one."""
    try:
        return RunResult(**json.loads((out / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{out / RESULT} is damaged ({describe(error)}); remove it, and the same command makes it again"
        ) from None


def _trained(
    config: RunConfig, out: Path, begun: bool, strict: bool, progress: Progress | None, signals: Signals
) -> RunResult:
    """The run itself, from its start or from the last checkpoint that is whole; its result is on disk at the end."""
    started = time.perf_counter()
    backend, start = _prepared(config, out, begun)
    with _closed_after_an_error(backend):
        _start(backend, out, progress)
        setup = time.perf_counter() - started
        result = _with_jumps(backend, config, out, start or None, strict, progress, signals)
    result.seconds |= {"setup": setup, "total": time.perf_counter() - started}
    write_text(out / RESULT, json_text(result.as_dict()) + "\n")  # what follows may still fail
    with _trainer_errors(out):
        backend.close()
    result.seconds["total"] = time.perf_counter() - started
    write_text(out / RESULT, json_text(result.as_dict()) + "\n")
    return result


def _prepared(config: RunConfig, out: Path, begun: bool) -> tuple[Backend, int]:
    """A backend that is ready, and the step to go on from."""
    backend: Backend = config.backend.make("backend")
    if begun:
        with _closed_after_an_error(backend), _trainer_errors(out):
            start = backend.prepare(config, out, True)
            if start:
                return backend, start
            if config.save_every is None:
                raise ConfigError(
                    f"{out} holds this run, which was ended before its end, and nothing to go on from: its config has "
                    "no save_every; pass --overwrite to start again, or choose another --out"
                )
            backend.close()  # killed before anything was saved
        backend = config.backend.make("backend")
    # Ended before its folder goes: until then it may write there.
    with fresh_directory(out, CONFIG), _closed_after_an_error(backend):
        write_text(out / CONFIG, dump_yaml(config))
        with _trainer_errors(out.parent):
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
) -> RunResult:
    """The cycle on a backend that is prepared, measured at its milestones."""
    accuracy: dict[str, float | None] = {"start": None, "before_jump": None, "after_jump": None, "final": None}
    measuring = _Stopwatch()
    journal = Journal(out / JOURNAL)
    earlier = [r for r in journal.counted() if r["event"] == CURVE and r["step"] <= (resumed_from or 0)]
    clock = _TrainingClock(measuring, earlier[-1]["seconds"] if earlier else 0.0)

    def measure(milestone: str, step: int) -> None:
        if milestone == CURVE:
            seconds = clock.seconds
            with measuring, _trainer_errors(out):
                journal.append(CURVE, step, seconds=seconds, **_accuracies(backend))
            return
        with measuring, _trainer_errors(out):
            accuracy[milestone] = backend.evaluate("test")
        journal.append("accuracy", step, milestone=milestone, value=accuracy[milestone])

    cycle = PredictExtendCycle(
        backend,
        lambda: config.predictor.make("predictor"),
        config.schedule,
        config.guards,
        config.steps,
        journal,
        rank=config.rank,
        compressor=None if config.compressor is None else config.compressor.make("compressor"),
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
    with _trainer_errors(out), signals.patient() if backend.in_process else contextlib.nullcontext():
        ended = cycle.run(on_step=lambda step: _tell(progress, RUNNING, step, config.steps))
    if signals.received is not None and ended < config.steps:
        raise Interrupted(
            f"{signals.name} ended the run after step {ended} of {config.steps}, with its state saved in {out}; the "
            "same command goes on",
            signals.received,
        )
    training = clock.stop()
    if config.measure_every is not None and config.steps % config.measure_every:
        measure(CURVE, config.steps)
    measure("final", config.steps)
    advice = cycle.advise(config.steps)
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
        notes=list(backend.notes),
        average=next((record for record in journal.counted() if record["event"] == "average"), None),
        advice=advice,
        curve=[_point(record) for record in journal.counted() if record["event"] == CURVE],
    )


def _accuracies(backend: Backend) -> dict[str, dict[str, float]]:
    return {split: dict(backend.accuracies(split)) for split in ("validation", "test")}


def _point(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("step", "seconds", "validation", "test")}


def _start(backend: Backend, out: Path, progress: Progress | None) -> None:
    with _trainer_errors(out):
        if not backend.in_process:
            _tell(progress, "the trainer starts", 0, 1)
        backend.start()
        if not backend.in_process:
            _tell(progress, "the trainer starts", 1, 1)


def _plain(config: RunConfig, out: Path, progress: Progress | None) -> dict[str, Any]:
    """The same seed and steps, and no jump."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    backend: Backend = config.backend.make("backend")
    with _closed_after_an_error(backend), _trainer_errors(out):
        backend.prepare(config.model_copy(update={"save_every": None}), out)
        _start(backend, out, progress)
        curve: list[dict[str, Any]] = []
        measuring = _Stopwatch()
        clock = _TrainingClock(measuring)

        def step_ended(step: int) -> None:
            _tell(progress, "plain RL", step, config.steps)
            if config.measure_every is not None and (step % config.measure_every == 0 or step == config.steps):
                seconds = clock.seconds
                with measuring:
                    curve.append({"step": step, "seconds": seconds, **_accuracies(backend)})

        if config.measure_every is not None:
            step_ended(0)
        clock.start()
        for stop in _stops(backend, config):
            backend.train(stop, step_ended)
        seconds = clock.stop()
        accuracy = backend.evaluate("test")
    with _trainer_errors(out):
        backend.close()
    return {"steps": config.steps, "seconds": seconds, "accuracy": {"final": accuracy}, "curve": curve}


def _stops(backend: Backend, config: RunConfig) -> list[int]:
    """Where a trainer that is launched has to stand still to be measured."""
    if backend.in_process or config.measure_every is None:
        return [config.steps]
    return [*range(config.measure_every, config.steps, config.measure_every), config.steps]


@contextlib.contextmanager
def _closed_after_an_error(backend: Backend) -> Iterator[None]:
    """End the trainer when the body fails, and let the body's error be the one that is seen."""
    try:
        yield
    except BaseException as error:
        try:
            backend.close()
        except Exception as second:
            error.add_note(f"the trainer could not be ended either: {describe(second)}")
        raise


@contextlib.contextmanager
def _trainer_errors(out: Path) -> Iterator[None]:
    """What the trainer, or a reward it calls, throws becomes one message; the traceback is kept in a file."""
    try:
        yield
    except NextCoreError:
        raise
    except Exception as error:
        if is_full(error):
            raise StorageError(
                f"the disk of {out} was full while the trainer wrote ({describe(error)}); free some space, and run the "
                "same command again: it goes on from the last checkpoint that is whole"
            ) from error
        log = out / ERROR_LOG
        with contextlib.suppress(OSError):  # the trainer's own error is the one to be seen
            log.write_text(traceback.format_exc(), encoding="utf-8")
        raise BackendError(f"the trainer failed: {describe(error)}; the whole traceback is in {log}") from error


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)


class _TrainingClock:
    """Seconds of training, those before a resume included; what ``measuring`` takes does not count."""

    def __init__(self, measuring: _Stopwatch, before: float = 0.0) -> None:
        self._measuring, self._before = measuring, before
        self._start: float | None = None
        self._measured = 0.0

    def start(self) -> None:
        self._start, self._measured = time.perf_counter(), self._measuring.seconds

    def stop(self) -> float:
        """Seconds since ``start``."""
        return self.seconds - self._before

    @property
    def seconds(self) -> float:
        if self._start is None:
            return self._before
        return self._before + time.perf_counter() - self._start - (self._measuring.seconds - self._measured)


class _Stopwatch:
    """Seconds spent inside ``with``, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
