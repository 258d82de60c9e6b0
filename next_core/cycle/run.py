"""One run from a config: a trainer, the cycle that drives it, a plain run beside it if asked for, and the result."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from next_core.config import RunConfig, dump_yaml
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.errors import BackendError, CheckpointError, ConfigError, NextCoreError
from next_core.interfaces import Backend, Progress
from next_core.plugins import describe
from next_core.storage import fresh_directory, json_text, write_text

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


def check_folder(out: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Whether ``out`` can be used as asked. Raises ``ConfigError``; changes nothing."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names the run's folder")
    if resume:
        if not (out / CONFIG).exists():
            raise ConfigError(f"{out} holds no run to resume; start it without --resume")
        if (out / CONFIG).read_text(encoding="utf-8") != dump_yaml(config):
            raise ConfigError(f"{out / CONFIG} differs from this config; resume with the config the run began with")
        if config.save_every is None:
            raise ConfigError("nothing to resume from: the config has no save_every")
    elif out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"{out} is not empty; choose another --out, or pass --resume or --overwrite")
        if not (out / CONFIG).exists():
            raise ConfigError(f"{out} is not a run folder (no {CONFIG}); refusing to overwrite it")


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Train with jumps (and, for ``control: plain``, once more without), and write ``result.json``."""
    check_folder(out, config, resume, overwrite)
    started = time.perf_counter()
    backend: Backend = config.backend.make("backend")
    # Ended before its folder goes: until then it may write there.
    with contextlib.nullcontext() if resume else fresh_directory(out), _closed_after_an_error(backend):
        with _trainer_errors(out.parent):
            start = backend.prepare(config, out, resume)
        if not resume:
            write_text(out / CONFIG, dump_yaml(config))
    with _closed_after_an_error(backend):
        if resume and start == 0:
            raise CheckpointError(f"{out} has no complete checkpoint to resume from; start again with --overwrite")
        _start(backend, out, progress)
        setup = time.perf_counter() - started
        result = _with_jumps(backend, config, out, start if resume else None, strict, progress)
    result.seconds |= {"setup": setup, "total": time.perf_counter() - started}
    write_text(out / RESULT, json_text(result.as_dict()) + "\n")  # what follows may still fail
    with _trainer_errors(out):
        backend.close()
    if config.control == "plain":
        result.control = _plain(config, out / "control", progress)
    result.seconds["total"] = time.perf_counter() - started
    write_text(out / RESULT, json_text(result.as_dict()) + "\n")
    return result


def _with_jumps(
    backend: Backend,
    config: RunConfig,
    out: Path,
    resumed_from: int | None,
    strict: bool,
    progress: Progress | None,
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
    )
    if resumed_from is not None:
        cycle.resume(resumed_from)
    else:
        journal.append("start", 0, steps=config.steps, seed=config.seed)
        measure("start", 0)
        if config.measure_every is not None:
            measure(CURVE, 0)
    clock.start()
    with _trainer_errors(out):
        cycle.run(on_step=lambda step: _tell(progress, RUNNING, step, config.steps))
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
        log = out / ERROR_LOG
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
