"""The tables of docs/benchmarks/auto.md, from the rows of `rates.py` and the curves of `tasks.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rates import ARM_RATES, STEPS, UNSEEN_RATES, By, Row, by_arm
from tables import half_width, mean, table
from tasks import MARKS, TASKS, UNSEEN
from tasks import RESULTS as TASK_RESULTS
from tasks import STEPS as LONGER

Curve = list[tuple[int, float]]
STARTS = sorted(ARM_RATES["auto"])
SWEEPS = {4: (1e-4, 1e-3, 1e-2, 1e-1), 8: tuple(sorted(ARM_RATES["plain"]))}
ENOUGH = 3
"""Seeds that a run needs to count as the best known one: the best of many single runs is a lucky one."""


class Known(NamedTuple):
    """A plain run: its kind and learning rate, and its final accuracy by seed."""

    name: str
    rate: float
    finals: dict[int, float]


def known(found: By, task: str, enough: int = ENOUGH) -> dict[str, list[Known]]:
    """Return plain runs of one task by kind, those with enough seeds."""
    kinds = {
        "constant": ("plain", "before_average", "constant rate"),
        "mean": ("plain", "final", "with the mean at the end"),
        "linear": ("linear", "final", "linear decay"),
    }
    return {
        kind: [
            Known(name, rate, {seed: row[figure] for seed, row in found[task, rate, arm].items()})
            for rate in sorted({rate for of, rate, kind in found if (of, kind) == (task, arm)})
            if len(found[task, rate, arm]) >= enough
        ]
        for kind, (arm, figure, name) in kinds.items()
    }


def best(runs: Sequence[Known]) -> Known | None:
    """Return the best over the seeds that all have."""
    if not runs:
        return None
    seeds = set.intersection(*(set(run.finals) for run in runs))
    return max(runs, key=lambda run: statistics.mean(run.finals[seed] for seed in seeds))


def best_known(found: By, task: str, enough: int = ENOUGH) -> Known | None:
    """Return the best of all plain runs."""
    return best([run for runs in known(found, task, enough).values() for run in runs])


def paired(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Return the mean difference and half its 95% interval, over the seeds that both have; "" where they share none."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return ""
    half = half_width(differences)
    return f"{statistics.mean(differences):+.3f}" + ("" if half is None else f" ±{half:.3f}")


def finals(rows: dict[int, Row], figure: str = "final") -> dict[int, float]:
    """Return one figure by seed."""
    return {seed: row[figure] for seed, row in rows.items()}


def every_rate(found: By) -> str:
    """Each task and starting rate: means over an arm's own seeds, differences over the seeds that both have."""
    rows = []
    for task in TASKS:
        rival = best_known(found, task)
        for rate in STARTS:
            auto, plain, jumps = (found.get((task, rate, arm), {}) for arm in ("auto", "plain", "adaptive-secant"))
            if not auto:
                continue
            ours = finals(auto)
            rows.append(
                [
                    task,
                    f"{rate:g}",
                    _with_mean(plain),
                    mean(list(finals(jumps).values())) if jumps else "",
                    _with_mean(auto),
                    mean([row["curve"][-1]["greedy"] for row in auto.values()]),
                    paired(ours, finals(plain)),
                    paired(ours, rival.finals) if rival else "",
                    ", ".join(str(len(arm)) for arm in (plain, jumps, auto)),
                ]
            )
    headings = (
        "task|learning rate|plain, with mean|adaptive-secant|auto, with mean|greedy|auto - plain with mean, 95%|"
        "auto - best known, 95%|seeds"
    )
    return table(headings.split("|"), rows)


def _with_mean(rows: dict[int, Row]) -> str:
    """Return the accuracy before and after the mean at the end, over seeds."""
    figures = ("before_average", "final")
    return ", ".join(mean(list(finals(rows, figure).values())) for figure in figures) if rows else ""


def tuned(found: By) -> str:
    """The best plain run of each kind; the best of all is the best known run."""
    rows = []
    for task in TASKS:
        chosen = [best(runs) for runs in known(found, task).values()]
        cells = [
            f"{mean(list(run.finals.values()))} ({run.rate:g}; {len(run.finals)})" if run else "" for run in chosen
        ]
        rows.append([task, *cells])
    return table(["task", "constant rate", "with the mean at the end", "linear decay from"], rows)


def auto_curve(row: Row) -> Curve:
    """Return sampled accuracy by step. At the last step it is that of the mean, where the run ends in one."""
    return [(point["step"], point["sampled"]) for point in row.get("curve", [])]


def plain_curves(task: str) -> dict[tuple[float, int], Curve]:
    """Return the committed curves of plain runs by rate and seed."""
    rows = json.loads(TASK_RESULTS.read_text())["rows"]
    return {
        (r["learning_rate"], r["seed"]): list(zip(MARKS, r["curve"], strict=True)) for r in rows if r["task"] == task
    }


def reached(curve: Curve, accuracy: float) -> float | None:
    """Return the first step at which an interpolated curve is at this accuracy."""
    for (step, value), (later, higher) in pairwise(curve):
        if value < accuracy <= higher:
            return step + (later - step) * (accuracy - value) / (higher - value)
    return None


def at_step(curve: Curve, step: float) -> float:
    """Return the interpolated accuracy at one step of a curve."""
    for (begin, value), (end, later) in pairwise(curve):
        if begin <= step <= end:
            return value + (later - value) * (step - begin) / (end - begin)
    raise ValueError(f"the curve ends before step {step:g}")


def against_longer(found: By) -> str:
    """250 steps of `auto` next to 400 plain ones of the same rate and seeds, and the steps that reach as much."""
    rows = []
    for task in TASKS:
        curves = plain_curves(task)
        for rate in sorted({rate for rate, _ in curves}):
            auto = found.get((task, rate, "auto"), {})
            longer = {seed: curve[-1][1] for (of, seed), curve in curves.items() if of == rate}
            if not auto:
                continue
            ours = finals(auto)
            steps = [reached(auto_curve(row), longer[seed]) for seed, row in auto.items() if seed in longer]
            cells = [mean(list(longer.values())), mean(list(ours.values())), paired(ours, longer), _steps(steps)]
            rows.append([task, f"{rate:g}", *cells, f"{len(longer)}, {len(auto)}"])
    headings = ["task", "learning rate", f"plain, {LONGER} steps", f"auto, {STEPS} steps", "auto - plain, 95%"]
    return table([*headings, "auto reaches it at step", "seeds"], rows)


def _steps(steps: Sequence[float | None]) -> str:
    """Return their mean and range; "never" where a run does not get there."""
    known_steps = [step for step in steps if step is not None]
    if len(known_steps) < len(steps):
        return f"never in {len(steps) - len(known_steps)} of {len(steps)}"
    text = f"{statistics.mean(known_steps):.0f}"
    return text if len(steps) == 1 else f"{text} ({min(known_steps):.0f} to {max(known_steps):.0f})"


def sweeps(found: By) -> str:
    """One run of `auto` next to sweeps of plain RL: of as many roll-outs in all, and of 250 steps a rate.

    Only of the seeds that `auto` has at every starting rate. Sweeps choose by test accuracy, which favours them.
    """
    rows = []
    for task in TASKS:
        autos = [found[task, rate, "auto"] for rate in STARTS if (task, rate, "auto") in found]
        seeds = set.intersection(*map(set, autos)) if autos else set()
        if not seeds:
            continue
        means = [statistics.mean(auto[seed]["final"] for seed in seeds) for auto in autos]
        cells = [f"{statistics.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})"]
        for rates in SWEEPS.values():
            curves = [auto_curve(row) for rate in rates for row in found.get((task, rate, "plain"), {}).values()]
            curves = [curve for curve in curves if curve]
            curves += [curve for (rate, seed), curve in plain_curves(task).items() if rate in rates and not seed]
            cells.append(f"{max(at_step(curve, STEPS / len(rates)) for curve in curves):.3f}")
        for rates in SWEEPS.values():
            runs = [finals(found.get((task, rate, "plain"), {})) for rate in rates]
            ends = [statistics.mean(run[seed] for seed in seeds & run.keys()) for run in runs if seeds & run.keys()]
            cells.append(f"{max(ends):.3f}" if ends else "")
        rows.append([task, *cells, str(len(seeds))])
    headings = ["task", f"auto, {STEPS} steps, from any rate"]
    headings += [f"sweep of {count}, {STEPS} steps in all" for count in SWEEPS]
    headings += [f"sweep of {count}, {count * STEPS:,} steps in all" for count in SWEEPS]
    return table([*headings, "seeds"], rows)


def rates_found(found: By) -> str:
    """The learning rate that `auto` found, over starting rates and seeds, next to the best constant ones."""
    rows = []
    for task in TASKS:
        runs = [row for rate in STARTS for row in found.get((task, rate, "auto"), {}).values()]
        marks = [row["found"] for row in runs if row["found"]]
        if not marks:
            continue
        constants = [best(known(found, task)[kind]) for kind in ("constant", "mean")]
        rows.append(
            [
                task,
                _range([mark["rate"] for mark in marks], ".1e"),
                _range([mark["step"] for mark in marks], ".0f"),
                _range([mark["last"] for mark in marks], ".1e"),
                ", ".join(f"{run.rate:g}" if run else "" for run in constants),
                f"{sum(row['restarts'] for row in runs)}, {sum(row['collapses'] for row in runs)}",
                f"{len(marks)} of {len(runs)}",
            ]
        )
    headings = "task|rate found|at step|rate at the end|best constant, with mean|restarts, collapses|runs"
    return table(headings.split("|"), rows)


def _range(values: Sequence[float], form: str) -> str:
    """Return the median and the range."""
    middle, low, high = (f"{value:{form}}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def unseen(found: By) -> str:
    """`auto` from every starting rate next to the best plain run, on tasks that no constant was chosen on."""
    starts = sorted(UNSEEN_RATES["auto"])
    rows = []
    for task in UNSEEN:
        autos = {rate: finals(found[task, rate, "auto"]) for rate in starts if (task, rate, "auto") in found}
        rival = best_known(found, task, enough=1)
        if not autos or rival is None:
            continue
        plain = found.get((task, 1e-3, "plain"), {})
        cells = [
            f"{mean(list(autos[rate].values()))} ({paired(autos[rate], rival.finals)})" if rate in autos else ""
            for rate in starts
        ]
        best_run = f"{mean(list(rival.finals.values()))} ({rival.name}, {rival.rate:g})"
        start = next(row["start"] for rate in autos for row in found[task, rate, "auto"].values())
        rows.append([task, f"{start:.3f}", best_run, _with_mean(plain), *cells])
    headings = ["task", "start", "best plain run", "plain at 0.001, with mean", *(f"auto from {r:g}" for r in starts)]
    return table(headings, rows)


def tables(rows: list[Row]) -> str:
    """All of them, each with its question."""
    found = by_arm(rows)
    parts = {
        "Every starting rate": every_rate(found),
        "The best plain run of each kind (its learning rate; seeds)": tuned(found),
        f"{STEPS} steps against {LONGER}": against_longer(found),
        "One run against a sweep": sweeps(found),
        "The learning rate that `auto` finds: median and range over starting rates and seeds": rates_found(found),
        "Tasks that no constant was chosen on, two seeds (in parentheses: `auto` - the best plain run)": unseen(found),
    }
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts.items())
