"""Stage: how the cost of compressing grows with the run, one size at a time, at small widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.speed import compress, reference
from benchmarks.speed.clock import apart, best_of
from benchmarks.speed.stage import Options, Result, stage
from benchmarks.speed.synthetic import HORIZON, STEPS, TOY, LoraRun, Shapes

SMALL = LoraRun(Shapes(256, 1024, 64, 2), rank=32)
TINY = LoraRun(TOY, rank=4)


@stage("scaling")
def scaling(options: Options) -> Result:
    """Checkpoints, matrices, LoRA rank and horizon, each varied alone."""
    base = TINY if options.toy else SMALL
    series = []
    with options.folder() as folder:
        for what, cases in _cases(base, options.toy).items():
            places = [
                (run.write(folder / f"{what}-{x}" / "checkpoints"), horizon) for x, (run, horizon) in cases.items()
            ]
            costs, _ = apart(measure, places, 1 if options.toy else 3, fresh=not options.toy)
            points = [
                {"x": x, "cpu_s": cost, "deltas": _deltas(*case)}
                for (x, case), cost in zip(cases.items(), costs, strict=True)
            ]
            exponent = round(fitted_exponent([p["x"] for p in points], [p["cpu_s"] for p in points]), 2)
            by_deltas = fitted_exponent([p["x"] for p in points], [p["deltas"] for p in points])
            series.append({"what": what, "points": points, "exponent": exponent, "deltas": round(by_deltas, 2)})
    shapes = base.shapes
    setting = {"hidden": shapes.hidden, "intermediate": shapes.intermediate, "kv": shapes.kv, "layers": shapes.layers}
    setting |= {"rank": base.rank, "checkpoints": len(base.steps), "horizon": HORIZON}
    return Result(setting, [], series)


def _cases(base: LoraRun, toy: bool) -> dict[str, dict[int, tuple[LoraRun, int]]]:
    """What is varied -> its values -> the run and the horizon."""

    def some(*values: int) -> tuple[int, ...]:
        return values[:2] if toy else values

    layers = base.shapes.layers
    wider = {7 * layers * k: replace(base, shapes=replace(base.shapes, layers=k * layers)) for k in some(1, 2, 4)}
    return {
        # A horizon of one interval, so that five checkpoints have targets too.
        "checkpoints": {
            count: (replace(base, steps=tuple(range(10, 10 * count + 1, 10))), 10) for count in some(5, 10, 15, 30)
        },
        "matrices": {count: (run, HORIZON) for count, run in wider.items()},
        "LoRA rank": {rank: (replace(base, rank=rank), HORIZON) for rank in some(8, 16, 32, 64, 128)},
        "horizon": {horizon: (base, horizon) for horizon in some(10, 20, 50, 100) if horizon < STEPS[-1]},
    }


def _deltas(run: LoraRun, horizon: int) -> int:
    return len(reference.different_spans(run.steps, horizon)) * len(run.shapes.matrices())


def measure(places: Sequence[tuple[Path, int]], repeats: int) -> list[float]:
    """Opening each run and compressing all its deltas, by CPU-seconds: the best of some, after one to warm up."""
    compress.components(*places[0])
    return [best_of(repeats, partial(compress.components, *place))[0]["cpu_s"] for place in places]


def fitted_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of y ~ x^p, by least squares of the logarithms."""
    a, b = ([math.log(value) for value in values] for values in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = sum((each - mean_a) ** 2 for each in a)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / spread
