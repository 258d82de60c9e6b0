"""Step scaling in the cycle: after each block of steps, predict how much larger the next ones should be."""

import math
from typing import Any

from next_core.backend import Backend
from next_core.cycle.collapse import RewardHistory, RewardTrend
from next_core.cycle.journal import Journal
from next_core.cycle.jump import failure
from next_core.cycle.measurements import Stopwatch
from next_core.errors import GuardError
from next_core.process.containment import TimeLimitReached, same_random_states, time_limit
from next_core.run_config import Guards
from next_core.step_predictor import StepHistory, StepPredictor, StepScale

EVENTS = ("scale", "collapse")  # Journal events of step scaling
KEEP_EVERY = 10
"""RL steps between kept states. The step at which a state is kept must look as good as the best before it."""
AFTER_COLLAPSE, AT_START = 2.0, 10.0
"""The multiple is divided by this after a collapse: by more where the run fell from its start within a few steps."""


class StepScaling:
    """Multiplies the trainer's steps as a predictor says, and undoes a collapse of the reward.

    A prediction that fails, takes too long or is not a positive number changes nothing. Everything is journalled, and
    all state is in the journal and in the trainer's own checkpoints.
    """

    def __init__(
        self, backend: Backend, predictor: StepPredictor, guards: Guards, journal: Journal,
        watch: Stopwatch, strict: bool = False,
    ) -> None:  # fmt: skip
        self._backend, self._predictor, self._guards, self._journal = backend, predictor, guards, journal
        self._watch, self._strict = watch, strict
        self._block = predictor.config.block
        self._rewards: RewardHistory | None = None
        self._judged, self._trends = 0, list[RewardTrend]()
        """How many rewards were logged when they were last judged, and what they said."""

    def after_step(self, step: int) -> None:
        with self._watch:
            steps = self._backend.steps
            steps.after_step()
            if step % self._block == 0:
                steps.end_block()
            trends = self._reward_trends()
            fallen = next((trend for trend in trends if trend.collapsed), None)
            if fallen is not None and self._backend.takes_weights(step):
                self._undo(step, fallen)
            elif step % self._block == 0:
                self._scale(step)
            if step - steps.kept[-1] >= KEEP_EVERY and not any(trend.short(1.5) for trend in trends):
                steps.keep(step)

    def cancels(self) -> bool:
        """Whether the motions of the last blocks cancel each other more than they agree."""
        history = StepHistory(0, 1.0, self._backend.steps.products())
        cosine = history.cosine(len(history.products) // 2)
        return cosine is not None and cosine < 0

    def _reward_trends(self) -> list[RewardTrend]:
        """Return how the last rewards compare with the best; computed anew only when the trainer logs one."""
        logged = self._backend.rewards() if self._guards.collapse else ()
        if len(logged) != self._judged:
            if self._rewards is None:
                self._rewards, self._judged = RewardHistory(self._abandoned()), 0
            for reward in logged[self._judged :]:
                self._rewards.add(reward)
            self._judged, self._trends = len(logged), self._rewards.trends()
        return self._trends

    def _abandoned(self) -> list[tuple[int, int]]:
        """Return the steps that a return to earlier weights undid: those after the first of a pair, to the second."""
        return [(record["back_to"], record["step"]) for record in scaling_records(self._journal) if "back_to" in record]

    def _scale(self, step: int) -> None:
        steps = self._backend.steps
        # Outside the time limit, which must not end process 0's part of a sum over processes.
        products, records, restart = steps.products(), scaling_records(self._journal), self._can_restart(step)
        history = StepHistory(step, steps.multiple, products, records, restart)
        try:
            with same_random_states(), time_limit(self._guards.time_limit):
                found = self._predictor.predict(history)
                reason = self._problem(found, step)
                figures = {} if reason else {str(key): float(value) for key, value in found.diagnostics.items()}
        except TimeLimitReached:
            reason = f"the predictor took longer than time_limit, {self._guards.time_limit:g} s"
        except (Exception, SystemExit) as error:
            reason = failure("predictor", error)
        if reason is not None:
            self._journal.append("scale", step, accepted=False, reason=reason, multiple=steps.multiple)
            if self._strict:
                raise GuardError(f"step {step}: no multiple: {reason}", kind="guard-refused")
            return
        back = {"back_to": 0} if found.restart else {}
        if found.restart:
            self._return_to(0)
        steps.multiple = float(found.multiple)
        rate = steps.learning_rate * steps.multiple
        # Waiting for the disk would double what step scaling costs.
        self._journal.append_unsynced(
            "scale", step, accepted=True, reason="", multiple=steps.multiple, rate=rate, found=bool(found.found),
            diagnostics=figures, **back,
        )  # fmt: skip

    def _return_to(self, step: int) -> None:
        self._backend.steps.undo(step)
        self._rewards, self._trends = None, []  # of an abandoned path

    def _can_restart(self, step: int) -> bool:
        # One state was kept since, at most: later a restart would cost too much.
        return 0 in self._backend.steps.kept[-2:] and self._backend.takes_weights(step)

    def _problem(self, found: Any, step: int) -> str | None:
        """Return why a prediction cannot be used; None where it can."""
        if not isinstance(found, StepScale):
            return f"the predictor returned a {type(found).__name__} instead of a StepScale"
        if not (math.isfinite(found.multiple) and found.multiple > 0):
            return f"the multiple is {found.multiple}"
        if found.restart and not self._can_restart(step):
            return "the weights from before the first step are not kept any more, or roll-outs depend on these"
        return None

    def _undo(self, step: int, trend: RewardTrend) -> None:
        """Return to the last good weights and moments, with a smaller multiple."""
        steps = self._backend.steps
        before, kept = steps.multiple, list(steps.kept)
        returned = [record["back_to"] for record in scaling_records(self._journal) if record["event"] == "collapse"]
        # Not a young state, nor one that has led to a collapse once, nor one whose reward had fallen.
        good = [at for at in kept if at <= step - KEEP_EVERY and at not in returned[-1:] and self._earned(at, trend)]
        target = good[-1] if good else kept[0]
        self._return_to(target)
        steps.multiple = before / (AT_START if target == 0 else AFTER_COLLAPSE)
        self._journal.append(
            "collapse", step, back_to=target, reward=trend.recent, best=trend.best, error=trend.error,
            multiple_before=before, multiple=steps.multiple, rate=steps.learning_rate * steps.multiple,
        )  # fmt: skip

    def _earned(self, at: int, trend: RewardTrend) -> bool:
        """Whether the weights of a kept state still earned half of the best reward."""
        assert self._rewards is not None
        if at >= trend.begins:  # the reward that is judged may be its own
            return False
        found = self._rewards.mean_after(at, min(at + KEEP_EVERY, trend.begins))
        return found is None or found >= trend.best - abs(trend.best) / 2


def scaling_records(journal: Journal) -> list[dict[str, Any]]:
    """Return the journal's records of step scaling that still count."""
    return [record for record in journal.counted() if record["event"] in EVENTS]
