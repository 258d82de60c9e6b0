"""The predict-extend cycle: observe, predict, guard, apply, verify. One state machine for every backend."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from next_core.backend import Backend
from next_core.cycle.alpha_search import with_best_alpha
from next_core.cycle.average import end_in_mean, mean_of_last, windows
from next_core.cycle.decisions import Decisions
from next_core.cycle.journal import Journal
from next_core.cycle.jump import Jump, check_origin, failure
from next_core.cycle.measurements import Stopwatch
from next_core.cycle.probes import Probes
from next_core.cycle.retention import Retention
from next_core.cycle.scaling import StepScaling
from next_core.errors import BackendError, GuardError, no_history, unsupported
from next_core.history.executor import Executor
from next_core.history.history import History
from next_core.interfaces import Applied, Compressor
from next_core.predictor import Predictor, TrajectoryPredictor, described
from next_core.process.containment import TimeLimitReached, same_random_states, time_limit
from next_core.run_config import Guards, Schedule
from next_core.step_predictor import StepPredictor
from next_core.types import Progress

Milestone = Callable[[str, int], None]


@dataclass(eq=False)
class PredictExtendCycle:
    """Drives one backend through one run of ``total`` steps.

    A callback calls ``after_step`` when an RL step has ended; ``run`` does so for trainers that are launched.
    ``strict`` turns a refused jump into a ``GuardError``; otherwise the worst case is a plain run. ``milestone`` is
    called with ``"before_jump"`` or ``"after_jump"`` and the step around the first jump that is made, with
    ``"before_average"`` at the end of a run that averages, and every ``measure_every`` steps with ``"curve"``, after
    everything else of that step. Once ``interrupted`` returns True, the backend is asked to end after its step.
    """

    backend: Backend
    predictor: Callable[[], Predictor]
    schedule: Schedule
    guards: Guards
    total: int
    journal: Journal
    _: KW_ONLY
    rank: int = 1
    compressor: Compressor | None = None
    executor: Executor | None = None
    strict: bool = False
    progress: Progress | None = None
    milestone: Milestone = lambda name, step: None
    measure_every: int | None = None
    interrupted: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        predictor = self.predictor()
        self._scaling: StepScaling | None = None
        if isinstance(predictor, TrajectoryPredictor):
            self.guards.check(self.schedule)
            self.schedule.check_predictor(predictor, self.total)
            self.backend.check_jumps(predictor.space)
            means = self.schedule if self.backend.measures else self.schedule.model_copy(update={"average": None})
            self._retention = Retention.of(predictor, means, self.guards, self.total)
            self._check_keep(predictor)
        self._watches = {what: Stopwatch() for what in ("observe", "predict", "extend", "probe")}
        if isinstance(predictor, StepPredictor):
            self.backend.follow_steps(self._windows)
            watch = self._watches["predict"]
            self._scaling = StepScaling(self.backend, predictor, self.guards, self.journal, watch, self.strict)
        self._probes = Probes(self.backend, self.journal, self.guards.probe, self._watches["probe"])
        self._decisions = Decisions(self.journal, self.backend)
        self._start = 0
        self._resumed_at: int | None = None
        self._jumps_made, self._first_jump_made = 0, False
        self._impossible = False  # a jump failed for a reason that the next one has too
        self._recovering: Jump | None = None  # the jump whose recovery window is still open

    @property
    def scales_steps(self) -> bool:
        """Whether the predictor scales the trainer's steps, so that there are no checkpoints and no jumps."""
        return self._scaling is not None

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that the cycle took, by what it did."""
        return {what: watch.seconds for what, watch in self._watches.items()}

    def run(self, on_step: Callable[[int], None] = lambda step: None) -> int:
        """Train to the end, jumping on the way. Calls ``on_step`` for every step that is known to have ended.

        Returns the last step that ended, which is before ``total`` if the run was interrupted.
        """
        last = self._start

        def report(step: int) -> None:
            nonlocal last
            last = step
            on_step(step)

        def step_ended(step: int) -> None:
            self.after_step(step)
            report(step)
            if self.interrupted():
                self.backend.stop()

        if self.backend.in_process:
            self.backend.train(self.total, step_ended)
            return last
        for step in range(self._start + 1, self.total + 1):
            if self._acts(step) or step == self.total:
                self.backend.train(step, report)
                self.after_step(step)
        return self.total

    def after_step(self, step: int) -> None:
        """Run one round of the cycle after an RL step: observe, predict, guard, apply, verify."""
        self._restore()
        if self._scaling is None:
            self._jump(step)
        else:
            self._scaling.after_step(step)
        if self._averages(step):
            self._end_in_mean(step)
        self._forget(step)
        self._decisions.show(sum(self.seconds.values()))
        if self._measures(step):
            self.milestone("curve", step)

    def _jump(self, step: int) -> None:
        """Judge the last jump, take a checkpoint, and jump, each where it is due."""
        self._verify_recovery(step)
        self._observe(step)
        if self._is_jump_due(step):
            jump = Jump(step, self.schedule.alpha)
            # A resumed trainer may generate at other steps than the schedule's.
            if not self.backend.takes_weights(step):
                jump = jump.refused("roll-outs of the weights from before it are left to train on")
            for stage in (self._predict, self._guard, self._apply, self._verify):
                if jump.accepted:
                    jump = stage(jump)
            self._conclude(jump)

    def _observe(self, step: int) -> None:
        """Take a checkpoint, and the accuracy that the trend of a later jump needs."""
        if self.schedule.observes(step) or self._averages(step):
            with self._watches["observe"]:
                self.backend.observe(step)
        if self._measures_trend(step):
            self._probes.at(step)

    def _check_keep(self, predictor: TrajectoryPredictor) -> None:
        """Raise ``BackendError`` where ``keep: needed`` cannot be had; warn where it deletes nothing."""
        if self.schedule.keep == "all":
            return
        if not self.backend.forgets:
            message = f"keep: needed is not supported by backend '{self.backend.name}'; set keep: all"
            raise unsupported(message)
        if self._retention.reads is None:
            message = "keep: needed deletes nothing before the last jump: '%s' reads all checkpoints"
            logging.getLogger(__name__).warning(message, predictor.name)

    def _forget(self, step: int) -> None:
        """With ``keep: needed``, delete what will not be read again."""
        due = self.schedule.observes(step) or step == self.total
        if due and self._scaling is None and self.schedule.keep == "needed":
            with self._watches["observe"]:
                self.backend.forget(step, self._retention.kept)

    def _predict(self, jump: Jump) -> Jump:
        """Fit a fresh predictor and measure the size of its jump.

        A predictor may be third-party code: its time is limited, the random states are restored, and its errors do not
        end the run.
        """
        try:
            with self._watches["predict"], same_random_states(), time_limit(self.guards.time_limit):
                predictor = self.predictor()
                assert isinstance(predictor, TrajectoryPredictor)
                predictor.progress = self.progress
                jump = dataclasses.replace(jump, predictor=predictor.name)
                history = self._history(jump.step)
                prediction = predictor.fit(history).predict(self.schedule.horizon)
                check_origin(prediction, history)
                jump = dataclasses.replace(jump, horizon=self.schedule.horizon, prediction=prediction)
                figures = {str(key): float(value) for key, value in prediction.diagnostics.items()}
                jump = dataclasses.replace(jump, diagnostics=figures)
                if prediction.abstention is not None:
                    return jump.refused(prediction.abstention)
                return jump.measured(history)
        except TimeLimitReached:
            return jump.refused(f"the predictor took longer than time_limit, {self.guards.time_limit:g} s")
        except (Exception, SystemExit) as error:
            return jump.refused(failure("predictor", error))

    def _history(self, step: int) -> History:
        history = History(self.backend.source(), self.rank, self.compressor, self.progress, executor=self.executor)
        history.jump_log = self.journal.jumps()
        if history.newest != step:
            raise GuardError(f"the newest checkpoint is from step {history.newest}", kind="guard-refused")
        return history

    def _guard(self, jump: Jump) -> Jump:
        """Choose alpha where the schedule has several; refuse a jump too large for the run's recent motion."""
        if self.schedule.alphas is not None:
            jump = with_best_alpha(jump, self.schedule.alphas, self.backend, self._probes, self._watches["extend"])
            if not jump.accepted:
                return jump
            jump = jump.measured(self._history(jump.step))
        bound, ratio = self.guards.max_norm_ratio, jump.norm_ratio
        if bound is not None and ratio is not None and ratio > bound:
            return jump.refused(
                f"the jump is {ratio:.1f} times the motion of the last {self.schedule.horizon} steps; "
                f"max_norm_ratio is {bound:g}"
            )
        return jump

    def _apply(self, jump: Jump) -> Jump:
        """Measure accuracy, then give the trainer the extrapolated weights. A failure changes nothing."""
        assert jump.prediction is not None
        before = self._probes.at(jump.step)
        if not self._first_jump_made:
            self.milestone("before_jump", jump.step)
        try:
            with self._watches["extend"]:
                applied = self.backend.apply_jump(jump.prediction, jump.alpha, keep=self.guards.recovery is not None)
        except Exception as error:
            self._impossible = isinstance(error, BackendError) and error.kind == "backend-unsupported"
            last = "; no other will be tried" if self._impossible else ""
            return jump.refused(failure("jump", error) + last)
        return dataclasses.replace(jump, applied=applied, accuracy_before=before)

    def _verify(self, jump: Jump) -> Jump:
        """Measure accuracy again, and roll the jump back if it fell too far."""
        prediction, applied = jump.prediction, jump.applied
        assert prediction is not None
        assert applied is not None
        before, after = jump.accuracy_before, self._probes.measure(jump.step)
        jump = dataclasses.replace(jump, accuracy_after=after)
        if before is not None and (after is None or after < before - self.guards.max_drop):
            self.backend.rollback(applied, jump.step)
            now = "an unknown value" if after is None else f"{after:.3f}"
            return jump.refused(f"accuracy fell from {before:.3f} to {now}; rolled back")
        return dataclasses.replace(jump, reason=prediction.moved())

    def _conclude(self, jump: Jump) -> None:
        """Journal the jump, and open its recovery window."""
        if jump.accepted:
            if not self._first_jump_made:
                self.milestone("after_jump", jump.step)
            self._first_jump_made = True
            self._jumps_made += 1
            if self.guards.recovery is not None and jump.accuracy_before is not None:
                self._recovering = dataclasses.replace(jump, prediction=None)  # the history may be large
        self.journal.append("jump", jump.step, **jump.record())
        if self.strict and not jump.accepted:
            raise GuardError(f"step {jump.step}: no jump: {jump.reason}", kind="guard-refused")

    def _verify_recovery(self, step: int) -> None:
        """After the recovery window: keep the jump, or go back to the weights from before it."""
        jump, recovery = self._recovering, self.guards.recovery
        if jump is None or recovery is None or step < jump.step + recovery:
            return
        assert jump.applied is not None
        assert jump.accuracy_before is not None
        self._recovering = None
        accuracy = self._probes.at(step)
        wanted = jump.accuracy_before - self.guards.tolerance
        if self.guards.against == "trend":
            wanted += self._probes.slope(jump.step, jump.accuracy_before, recovery) * (step - jump.step)
        accepted = accuracy is not None and accuracy >= wanted
        reason = f"accuracy {accuracy} after {step - jump.step} steps of recovery, {wanted:.3f} required"
        if not accepted:
            self.backend.rollback(jump.applied, step)
            self._jumps_made -= 1
            reason += "; rolled back"
        self.journal.append("verify", step, jump_step=jump.step, accepted=accepted, reason=reason, accuracy=accuracy)
        if self.strict and not accepted:
            raise GuardError(f"step {step}: {reason}", kind="guard-refused")

    def _end_in_mean(self, step: int) -> None:
        self.milestone("before_average", step)

        def apply(window: int) -> Applied:
            with self._watches["extend"]:
                if self._scaling is not None:
                    return self.backend.steps.apply_mean(window)
                return self.backend.apply_jump(mean_of_last(self.backend.source(), window), 1.0)

        def rollback(applied: Applied) -> None:
            if self._scaling is not None:
                applied.rollback()
            else:
                self.backend.rollback(applied, step)

        windows = self._windows
        # Where motions cancel at the end, steps are too large to converge, and a mean is closer to the optimum.
        cancels = self._scaling is not None and self._scaling.cancels()
        unmeasured = windows[len(windows) // 2] if windows and cancels else None
        end_in_mean(apply, rollback, self._probes, self.journal, step, windows, unmeasured)

    @property
    def _windows(self) -> list[int]:
        """The windows of the means to try at the end; only the middle one where they cannot be compared."""
        average = self.schedule.average
        found = [] if average is None else windows(average, self.schedule.every)
        return found if self.backend.measures else found[len(found) // 2 :][:1]

    def resume(self, step: int) -> None:
        """Continue a run from ``step``. Its journal is read when the backend ends its first step."""
        self._start = self._resumed_at = step

    def _restore(self) -> None:
        """Restore the cycle's state at the step from which the run resumes; later records do not count."""
        if self._resumed_at is None:
            return
        step, self._resumed_at = self._resumed_at, None
        if self._scaling is None:
            self.backend.reopen(range(self._retention.oldest(step), step + 1), self.schedule.every)
        self.journal.append("resume", step, **self._other_predictor(step))
        counted, jumps = self.journal.counted(), [jump for jump in self.journal.jumps() if jump["accepted"]]
        self._jumps_made = len(jumps)
        # Also one that was rolled back after its recovery window.
        self._first_jump_made = any(record["event"] == "jump" and record["accepted"] for record in counted)
        self._probes.restore(counted)
        if self.guards.recovery is not None and jumps and step < jumps[-1]["step"] + self.guards.recovery:
            self._reopen_recovery(jumps[-1])

    def _other_predictor(self, step: int) -> dict[str, Any]:
        """Return the predictor for the journal, with a warning, if the run had another one before it was resumed."""
        counted, now = self.journal.counted(), described(self.predictor())
        known = [one["predictor"] for one in counted if one["event"] in ("start", "resume") and "predictor" in one]
        if not known or known[-1] == now:
            return {}
        change = "after step %d the predictor is %s, and was %s before"
        logging.getLogger(__name__).warning(change, step, now, known[-1])
        return {"predictor": now}

    def _reopen_recovery(self, record: dict[str, Any]) -> None:
        """Restore the recovery window of a jump that was open when the run ended."""
        if record["accuracy_before"] is None:
            return
        applied = self.backend.active_jump(record["step"])
        if applied is None:
            raise no_history(
                f"the recovery window of the jump after step {record['step']} is open, and the weights from before the "
                "jump were not kept; resume from an earlier checkpoint"
            )
        self._recovering = Jump(
            record["step"], record["alpha"], applied=applied, accuracy_before=record["accuracy_before"]
        )

    def _acts(self, step: int) -> bool:
        """Whether a trainer that is launched in segments has to pause after ``step``."""
        recovery = self.guards.recovery
        return (
            self.scales_steps
            or self.schedule.observes(step)  # it does wherever a jump is attempted
            or (recovery is not None and self.schedule.attempts(step - recovery, self.total))
            or self._measures_trend(step)
            or self._measures(step)
        )

    def _is_jump_due(self, step: int) -> bool:
        allowed = self.schedule.jumps is None or self._jumps_made < self.schedule.jumps
        attempts = allowed and self.schedule.attempts(step, self.total)
        return attempts and self._recovering is None and not self._impossible

    def _averages(self, step: int) -> bool:
        return step == self.total and self.schedule.average is not None

    def _measures(self, step: int) -> bool:
        return self.measure_every is not None and step % self.measure_every == 0

    def _measures_trend(self, step: int) -> bool:
        """Whether accuracy is needed here to know the trend at the next jump."""
        recovery = self.guards.recovery
        return (
            recovery is not None
            and self.guards.against == "trend"
            and self.schedule.attempts(step + recovery, self.total)
        )
