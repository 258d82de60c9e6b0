"""The predict-extend cycle: observe, predict, guard, jump, verify, go on. One state machine for every backend."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from next_core.backend import Backend
from next_core.cycle.average import mean_of_last, windows
from next_core.cycle.journal import Journal
from next_core.cycle.jump_norm import jump_norm
from next_core.errors import CheckpointError, GuardError, NextCoreError, describe
from next_core.history.executor import Executor
from next_core.history.history import History
from next_core.interfaces import Applied, Compressor, Prediction
from next_core.predictor import TrajectoryPredictor
from next_core.process.containment import TimeLimitReached, same_random_states, time_limit
from next_core.run_config import Guards, Schedule
from next_core.types import Progress

Milestone = Callable[[str, int], None]


@dataclass
class _Pending:
    """A jump whose recovery window is still open."""

    step: int
    before: float
    slope: float
    applied: Applied


class PredictExtendCycle:
    """Drives one backend through one run of ``total`` steps.

    A callback tells it that a step ended (``after_step``); ``run`` does the same for trainers that are launched.
    ``strict`` turns a refused jump into a ``GuardError``; otherwise the worst case is a plain run. ``milestone`` is
    called with ``"before_jump"`` or ``"after_jump"`` and the step around the first jump that is made, with
    ``"before_average"`` at the end of a run that averages, and every ``measure_every`` steps with ``"curve"``, after
    what the cycle did there. Once ``interrupted`` says so, the backend is asked to end after its step.
    """

    def __init__(
        self,
        backend: Backend,
        predictor: Callable[[], TrajectoryPredictor],
        schedule: Schedule,
        guards: Guards,
        total: int,
        journal: Journal,
        *,
        rank: int = 1,
        compressor: Compressor | None = None,
        executor: Executor | None = None,
        strict: bool = False,
        progress: Progress | None = None,
        milestone: Milestone | None = None,
        measure_every: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        schedule.check(total)
        guards.check(schedule)
        schedule.check_predictor(predictor(), total)
        self.backend, self.predictor, self.schedule, self.guards = backend, predictor, schedule, guards
        self.total, self.journal, self.rank = total, journal, rank
        self.compressor, self.executor = compressor, executor
        self.strict, self.progress, self.milestone = strict, progress, milestone
        self.measure_every, self.interrupted = measure_every, interrupted
        self.seconds = {"observe": 0.0, "predict": 0.0, "extend": 0.0, "probe": 0.0}
        self._pending: _Pending | None = None
        self._probes: dict[int, float] = {}
        self._from, self._resuming = 0, False
        self._made = 0
        self._first_done = False

    def run(self, on_step: Callable[[int], None] = lambda step: None) -> int:
        """Train to the end, jumping on the way; ``on_step`` is told of every step that is known to have ended.

        Returns the step it ended after: an earlier one than the last if it was interrupted.
        """
        ended = self._from

        def told(step: int) -> None:
            nonlocal ended
            ended = step
            on_step(step)

        def step_ended(step: int) -> None:
            self.after_step(step)
            told(step)
            if self.interrupted():
                self.backend.stop()

        if self.backend.in_process:
            self.backend.train(self.total, step_ended)
            return ended
        steps = range(self._from + 1, self.total + 1)
        for stop in (step for step in steps if self._acts(step) or step == self.total):
            self.backend.train(stop, told)
            self.after_step(stop)
        return self.total

    def resume(self, step: int) -> None:
        """Take up a run that had reached ``step``, when the next step ends: by then the backend has taken it up too."""
        self._from, self._resuming = step, True

    def _take_up(self) -> None:
        """What was journalled after the resumed step does not count."""
        self._resuming = False
        self.journal.append("resume", self._from)
        jumps = [jump for jump in self.journal.jumps() if jump["accepted"]]
        self._made, self._first_done = len(jumps), bool(jumps)
        for record in self.journal.counted():
            if record["event"] == "probe" and record["accuracy"] is not None:
                self._probes.setdefault(record["step"], record["accuracy"])
        if self.guards.recovery is not None and jumps and self._from < jumps[-1]["step"] + self.guards.recovery:
            self._reopen(jumps[-1])

    def _reopen(self, jump: dict[str, Any]) -> None:
        """Take up the recovery window of a jump that was open when the run ended."""
        before = jump["accuracy_before"]
        if before is None:
            return
        applied = self.backend.active_jump(jump["step"])
        if applied is None:
            raise CheckpointError(
                f"the jump after step {jump['step']} is still to be judged, and what it would be rolled back to was "
                "not kept; resume from an earlier checkpoint"
            )
        self._pending = _Pending(jump["step"], before, self._slope(jump["step"], before), applied)

    def _acts(self, step: int) -> bool:
        recovery = self.guards.recovery
        return (
            self.schedule.observes(step)
            or self.schedule.attempts(step, self.total)
            or (recovery is not None and self.schedule.attempts(step - recovery, self.total))
            or self._trend_probe(step)
            or self._measures(step)
        )

    def _measures(self, step: int) -> bool:
        return self.measure_every is not None and step % self.measure_every == 0

    def after_step(self, step: int) -> None:
        """The whole cycle, once after each RL step."""
        if self._resuming:
            self._take_up()
        if self._pending is not None and step >= self._pending.step + (self.guards.recovery or 0):
            self._verify(self._pending, step)
        averages = step == self.total and self.schedule.average is not None
        if self.schedule.observes(step) or averages:
            with self._timed("observe"):
                self.backend.observe(step)
        if self._trend_probe(step):
            self._probe(step)
        if self.schedule.attempts(step, self.total) and self._made < self.schedule.limit and self._pending is None:
            self._jump(step)
        if averages and self.schedule.average is not None:
            self._average(step, self.schedule.average)
        if self.milestone is not None and self._measures(step):
            self.milestone("curve", step)

    def _jump(self, step: int) -> None:
        """Predict, guard, extend, look at the result; put everything back when it is refused."""
        facts: dict[str, Any] = {"predictor": "?", "alpha": self.schedule.alpha, "norm_ratio": None}
        try:
            with self._timed("predict"), same_random_states(), time_limit(self.guards.time_limit):
                prediction = self._predict(step, facts)
        except TimeLimitReached:
            return self._refuse(step, facts, f"the predictor took longer than time_limit, {self.guards.time_limit:g} s")
        except (Exception, SystemExit) as error:  # a predictor may be anybody's code: it must not end the run
            return self._refuse(step, facts, _reason("predictor", error))
        before = self._probe(step)
        if not self._first_done and self.milestone is not None:
            self.milestone("before_jump", step)
        try:
            with self._timed("extend"):
                applied = self.backend.apply_jump(
                    prediction, self.schedule.alpha, keep=self.guards.recovery is not None
                )
        except Exception as error:  # and nothing was changed
            return self._refuse(step, facts, _reason("jump", error))
        after = self._probe(step, again=True)
        facts |= {"accuracy_before": before, "accuracy_after": after}
        if before is not None and not (after is not None and after >= before - self.guards.max_drop):
            self.backend.rollback(applied, step)
            now = "what cannot be measured" if after is None else f"{after:.3f}"
            return self._refuse(step, facts, f"accuracy fell from {before:.3f} to {now}; rolled back")
        if not self._first_done and self.milestone is not None:
            self.milestone("after_jump", step)
        self._first_done = True
        self._made += 1
        if self.guards.recovery is not None and before is not None:
            self._pending = _Pending(step, before, self._slope(step, before), applied)
        moved = sum(1 for name in prediction.updates if prediction.weight(name) != 0.0)
        reason = f"{moved} of {len(prediction.source.parameters)} matrices"
        self.journal.append("jump", step, accepted=True, reason=reason, **facts)
        return None

    def _predict(self, step: int, facts: dict[str, Any]) -> Prediction:
        predictor = self.predictor()
        predictor.progress = self.progress
        facts["predictor"] = predictor.name
        history = History(self.backend.source(), self.rank, self.compressor, self.progress, executor=self.executor)
        history.jump_log = self.journal.jumps()
        if history.newest != step:
            raise _Refused(f"the newest checkpoint is of step {history.newest}")
        prediction = predictor.fit(history).predict(self.schedule.horizon)
        _check_origin(prediction, history)
        facts["horizon"] = self.schedule.horizon
        facts["diagnostics"] = {str(key): float(value) for key, value in prediction.diagnostics.items()}
        if prediction.abstention is not None:
            raise _Refused(prediction.abstention)
        norm = jump_norm(prediction, self.schedule.alpha, history)
        facts |= {"norm": norm.jump, "norm_ratio": norm.ratio}
        bound = self.guards.max_norm_ratio
        if bound is not None and norm.ratio > bound:
            raise _Refused(
                f"the jump is {norm.ratio:.1f} times the motion of the last {self.schedule.horizon} steps; "
                f"max_norm_ratio is {bound:g}"
            )
        return prediction

    def _average(self, step: int, average: int) -> None:
        """At the end: the mean of the last checkpoints over the window that validates best, if it is better."""
        if self.milestone is not None:
            self.milestone("before_average", step)
        before, tried = self._probe(step, again=True, asked=True), dict[int, float | None]()
        facts: dict[str, Any] = {"accuracy_before": before}
        best, reason = None, "there is nothing to measure accuracy with"
        for window in windows(average, self.schedule.every) if before is not None else []:
            try:
                applied = self._go_to_mean(window)
            except Exception as error:  # and nothing was changed
                reason = _reason("mean", error)
                break
            tried[window] = self._probe(step, again=True, asked=True)
            self.backend.rollback(applied, step)
            reason = "no mean of the last checkpoints is better"
        better = {window: accuracy for window, accuracy in tried.items() if accuracy is not None and before is not None}
        if better and max(better.values()) > facts["accuracy_before"]:
            best = max(better, key=lambda window: better[window])
            reason = f"the mean of the last {best} steps"
            try:
                self._go_to_mean(best)
            except Exception as error:  # and nothing was changed
                best, reason = None, _reason("mean", error)
        facts["tried"] = {str(window): accuracy for window, accuracy in tried.items()}
        self.journal.append("average", step, accepted=best is not None, reason=reason, **facts)

    def _go_to_mean(self, window: int) -> Applied:
        with self._timed("extend"):
            return self.backend.apply_jump(mean_of_last(self.backend.source(), window), 1.0)

    def _verify(self, pending: _Pending, step: int) -> None:
        """After the recovery window: keep the jump, or go back to the weights from before it."""
        self._pending = None
        accuracy = self._probe(step)
        wanted = pending.before - self.guards.tolerance
        if self.guards.against == "trend":
            wanted += pending.slope * (step - pending.step)
        accepted = accuracy is not None and accuracy >= wanted
        reason = f"accuracy {accuracy} after {step - pending.step} steps of recovery, {wanted:.3f} wanted"
        if not accepted:
            self.backend.rollback(pending.applied, step)
            self._made -= 1
            reason += "; rolled back"
        self.journal.append("verify", step, jump_step=pending.step, accepted=accepted, reason=reason, accuracy=accuracy)
        if not accepted and self.strict:
            raise GuardError(f"step {step}: {reason}")

    def _refuse(self, step: int, facts: dict[str, Any], reason: str) -> None:
        self.journal.append("jump", step, accepted=False, reason=reason, **facts)
        if self.strict:
            raise GuardError(f"step {step}: no jump: {reason}")

    def _trend_probe(self, step: int) -> bool:
        """Whether accuracy is needed here to know the trend at the next jump."""
        recovery = self.guards.recovery
        return (
            recovery is not None
            and self.guards.against == "trend"
            and self.schedule.attempts(step + recovery, self.total)
        )

    def _slope(self, step: int, before: float) -> float:
        then = self._probes.get(step - (self.guards.recovery or 0))
        return 0.0 if then is None else (before - then) / (self.guards.recovery or 1)

    def _probe(self, step: int, again: bool = False, asked: bool = False) -> float | None:
        if not self.guards.probe and not asked:
            return None
        if not again and step in self._probes:
            return self._probes[step]
        problem = None
        with self._timed("probe"):
            try:
                accuracy = self.backend.evaluate()
            except Exception as error:  # a probe may be anybody's code as well
                accuracy, problem = None, describe(error)
        if accuracy is not None and not math.isfinite(accuracy):
            accuracy, problem = None, f"the accuracy is {accuracy}"
        if accuracy is not None or problem is not None:
            self.journal.append("probe", step, accuracy=accuracy, **({"problem": problem} if problem else {}))
        if accuracy is not None and not again:
            self._probes[step] = accuracy
        return accuracy

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


def _check_origin(prediction: Any, history: History) -> None:
    """Somebody's predictor may return anything, a prediction for another run or an older checkpoint included."""
    if not isinstance(prediction, Prediction):
        raise _Refused(f"the predictor returned no prediction but {type(prediction).__name__}")
    if prediction.source is not history.source:
        raise _Refused("the prediction is of another source than the run's")
    if prediction.step != history.newest:
        raise _Refused(f"the prediction counts from step {prediction.step}, and the run is at step {history.newest}")


def _reason(what: str, error: BaseException) -> str:
    return str(error) if isinstance(error, NextCoreError) else f"the {what} failed: {describe(error)}"


class _Refused(NextCoreError):  # noqa: N818 - not an error of the run
    """A jump that is not made, with the reason."""
