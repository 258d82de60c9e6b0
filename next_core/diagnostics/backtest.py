"""``backtest``: judge predictors on a recorded run, walking forward, without training; see docs/backtest.md."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from next_core.cycle.jump import check_origin
from next_core.diagnostics.backtest_results import Backtest, Failure, Judged, Score, WalkNull, skill_interval
from next_core.diagnostics.replay import CutHistory, Replay, Shared, make_replay
from next_core.errors import describe, wrong_answer
from next_core.history.history import DeltaKind, History
from next_core.interfaces import CheckpointSource, Prediction, Update
from next_core.plugins import PredictorLike, registry, resolve_predictor, trajectory_predictors
from next_core.predictor import TrajectoryPredictor
from next_core.types import Progress

BASELINES = ("stay", "random", "ridge")  # Always judged: no jump, a jump in a random direction, the linear control
Chosen = Mapping[str, Callable[[], TrajectoryPredictor]]
"""What makes each predictor anew, by the name it is reported under."""


def backtest(
    run: CheckpointSource | History,
    predictors: Sequence[PredictorLike] | Mapping[str, Mapping[str, Any]] | None = None,
    *,
    horizon: int | None = None,
    cuts: int | None = None,
    draws: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Backtest:
    """Predict ``horizon`` RL steps ahead of every observed step that has a checkpoint there, and compare.

    At each cut a predictor is fitted to what was observed up to it. It is judged in merged space at alpha 1, with its
    own confidences; one that raises or returns nonsense is reported in its ``failures``. ``predictors`` are whatever
    ``resolve_predictor`` accepts, or names with their settings; None takes those that treat each matrix alone.
    ``horizon`` None: see ``default_horizon``. ``cuts`` limits their number, evenly spaced back from the last. ``draws``
    random walks (``next_core.sources.source_views.RandomWalk``) give the null. Raises ``PluginError`` for an unknown
    predictor, ``ConfigError`` for its settings or a horizon that no two checkpoints span, ``CheckpointError`` for what
    cannot be read.
    """
    chosen, notes = _choose(predictors)
    whole = run if isinstance(run, History) else History(run)
    replay = make_replay(whole.source, whole.steps, horizon, cuts, draws, seed)
    if replay.start is not None:
        notes.append(f"no backbone: the motion is known from step {replay.start} on")
    return _WalkForward(whole, replay, chosen, progress).judge(notes)


def default_predictors() -> tuple[list[str], list[str]]:
    """Return the predictors that treat each matrix alone, and notes on the others: networks train at every cut."""
    names, notes = trajectory_predictors()
    shared = [name for name in names if registry().get("predictor", name).shares]
    alone = [name for name in names if name not in shared]
    if shared:
        notes.append(f"not judged, because they train at every cut: {', '.join(shared)}; name them, or all")
    return alone, notes


def _choose(predictors: Sequence[PredictorLike] | Mapping[str, Mapping[str, Any]] | None) -> tuple[Chosen, list[str]]:
    """Check the predictors and their settings before any work, and add the baselines."""
    notes: list[str] = []
    if predictors is None:
        predictors, notes = default_predictors()
    if isinstance(predictors, Mapping):
        predictors = [{"name": name, **fields} for name, fields in predictors.items()]
    chosen: dict[str, Callable[[], TrajectoryPredictor]] = {}
    for given in predictors:
        make = resolve_predictor(given)
        name = given if isinstance(given, str) else make().name
        while name in chosen:  # the same predictor with other settings
            stem, _, number = name.partition("#")
            name = f"{stem}#{int(number or 1) + 1}"
        chosen[name] = make
    return {name: resolve_predictor(name) for name in BASELINES if name not in chosen} | chosen, notes


class _WalkForward:
    def __init__(self, whole: History, replay: Replay, chosen: Chosen, progress: Progress | None) -> None:
        self.whole, self.replay, self.chosen = whole, replay, chosen
        self.progress: Progress = progress or (lambda what, done, total: None)
        self.names = tuple(sorted(whole.shapes))
        self.done = 0
        self.seconds = dict.fromkeys(chosen, 0.0)
        self.problems: dict[str, dict[int, list[str]]] = {name: defaultdict(list) for name in chosen}
        self.silence: dict[str, dict[int, str]] = {name: {} for name in chosen}
        # <P, P>, <P, D> and <D, D> by draw (0 is the run itself), cut and matrix
        shape = 1 + replay.draws, len(replay.cuts), len(self.names), 3
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name in chosen}

    def judge(self, notes: Sequence[str]) -> Backtest:
        replay, begin = self.replay, time.perf_counter()
        motion = {}
        for name, found in zip(self.names, self.whole.executor.map(replay, self.names), strict=True):
            motion[name] = found
            self.progress("read motion", len(motion), len(self.names))
        # Without jumps, all cuts share what was decomposed. With jumps, each cut sees other factors.
        together = [(cut,) for cut in replay.cuts] if replay.jumps else [replay.cuts]
        for draw in range(1 + replay.draws):
            for cuts in together:
                seen = {cut: {name: motion[name][draw, cut] for name in self.names} for cut in cuts}
                self._predict_all(draw, seen)
        judged = [self._judged(name) for name in self.chosen]
        judged.sort(key=lambda one: -math.inf if one.score.skill is None else one.score.skill, reverse=True)
        return Backtest(
            horizon=replay.horizon,
            cuts=replay.cuts,
            block=replay.block,
            draws=replay.draws,
            seed=replay.seed,
            matrices=len(self.names),
            predictors={one.name: one for one in judged},
            shared_seconds=time.perf_counter() - begin - sum(self.seconds.values()),
            notes=tuple(notes),
        )

    def _predict_all(self, draw: int, motion: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Predict at some cuts of the run or of a walk, then compare by matrix; ``motion`` is by cut and matrix."""
        shared = Shared()
        asked: list[tuple[int, str, CutHistory, Prediction | None]] = []
        for cut in sorted(motion, reverse=True):  # the last one decomposes at once what the cuts before it need as well
            history = CutHistory(self.whole, self.replay, draw, cut, motion[cut], shared)
            asked += [(cut, name, history, self._predict(name, history, draw, cut)) for name in self.chosen]
            self.done += len(self.chosen)
            self.progress("predict", self.done, (1 + self.replay.draws) * len(self.replay.cuts) * len(self.chosen))
        for column, matrix in enumerate(self.names):
            for cut, name, history, prediction in asked:
                sums = self.sums[name][draw, self.replay.cuts.index(cut), column]
                sums[2] = motion[cut][matrix][-1, -1].clamp_min(0)
                if prediction is not None and matrix in prediction.updates:
                    try:
                        sums[0], sums[1] = history.compare(prediction, matrix)
                    except Exception as error:  # a wrong update of one matrix leaves the others
                        self._failed(name, draw, cut, error)

    def _predict(self, name: str, history: History, draw: int, cut: int) -> Prediction | None:
        """Fit and predict; report what goes wrong on the run itself."""
        try:
            predictor, horizon = self.chosen[name](), self.replay.horizon
            predictor.progress = self.progress
            # What a predictor says that it reads is shared, so no predictor's seconds should include it.
            kinds: list[DeltaKind] = [kind for kind in get_args(DeltaKind) if kind in predictor.requires]
            if kinds and predictor.why_not(history.steps, horizon) is None:
                history.compress(*kinds, horizon=horizon)
            begin = time.perf_counter()
            prediction = predictor.fit(history).predict(horizon)
            seconds = time.perf_counter() - begin
            check_origin(prediction, history)
            _check(prediction)
        except Exception as error:  # anyone's code: it must not end the backtest
            self._failed(name, draw, cut, error)
            return None
        if draw == 0:
            self.seconds[name] += seconds
            why = Counter(prediction.abstained.values()).most_common(1)
            self.silence[name][cut] = prediction.abstention or (why[0][0] if why else "it predicted no motion")
        return None if prediction.abstention is not None else prediction

    def _failed(self, name: str, draw: int, cut: int, error: Exception) -> None:
        if draw == 0:
            self.problems[name][cut].append(describe(error))

    def _judged(self, name: str) -> Judged:
        replay, sums, problems = self.replay, self.sums[name], self.problems[name]
        run = sums[0]
        acted = (run[..., 0] > 0).any(-1)
        silent = [cut for cut, moved in zip(replay.cuts, acted.tolist(), strict=True) if not moved]
        reasons = Counter(self.silence[name][cut] for cut in silent if cut not in problems)
        more = {cut: f" (and {len(each) - 1} more)" * (len(each) > 1) for cut, each in problems.items()}
        return Judged(
            name=name,
            fields=self.chosen[name]().config.model_dump(mode="json", exclude_unset=True),
            score=Score.of(run),
            interval=skill_interval(run.sum(1), replay.block, replay.seed),
            null=WalkNull.of(sums),
            acting=Score.of(run[acted]),
            acted=int(acted.sum()),
            abstained=reasons.total() / len(replay.cuts),
            seconds=self.seconds[name],
            by_cut=tuple(Score.of(one).skill for one in run),
            per_matrix={
                matrix: (Score.of(run[:, column]), WalkNull.of(sums[:, :, column]))
                for column, matrix in enumerate(self.names)
            },
            failures=tuple(Failure(cut, problems[cut][0] + more[cut]) for cut in replay.cuts if cut in problems),
            reasons=dict(reasons),
        )


def _check(prediction: Prediction) -> None:
    """Raise ``PluginError`` for updates of what the run does not have, and for what is no update."""
    updates: Mapping[str, object] = prediction.updates
    for name, update in updates.items():
        prediction.parameter(name)
        if not isinstance(update, Update):
            raise wrong_answer(f"the update of '{name}' is {type(update).__name__}; return an Update")
