"""A few plain sentences on what the figures say, each with the figure and its null."""

from __future__ import annotations

from next_core.diagnostics.analysis_results import Analysis, Figure, Group, LearningRate, Null, number

RANK_ONE = 0.9
"""From this share of the energy on, one singular triplet tells nearly all of a delta."""
WORTH_TELLING = 2.0
"""What looks too small by less than this cannot be told from what is right."""
SLOW, FAST = 0.67, 1.5


def advice(analysis: Analysis) -> tuple[str, ...]:
    """What a colleague would say on seeing the figures; reads only what is there."""
    if not analysis.matrices:
        return ("No matrix moved over the last interval: check that training changes the weights.",)
    told = (
        _few(analysis),
        _direction(analysis.overall),
        learning_rate_advice(analysis.learning_rate),
        _forward(analysis),
        _in_sample(analysis.overall),
        _rank(analysis.overall),
        _speed(analysis.overall),
        _precision(analysis),
    )
    return tuple(sentence for sentence in told if sentence is not None)


def learning_rate_advice(rate: LearningRate) -> str | None:
    """How many times too small the learning rate looks, and why; None where it does not, or cannot be told."""
    if rate.factor is None or rate.factor < WORTH_TELLING or rate.low is None or rate.high is None:
        return None
    assert rate.agreement is not None
    agree = f"successive motions of {rate.span} steps agree by {number(rate.agreement)}{_walk(rate.null)}"
    if rate.multiple is not None:
        agree = f"auto multiplied its steps by {rate.multiple:.1f} (median), and with that {agree}"
    elif rate.jumps:
        agree = f"with its {rate.jumps} jump{'s' if rate.jumps > 1 else ''} in play, which come on top, {agree}"
    times = f"{rate.factor:.2g} times too small ({rate.low:.2g} to {rate.high:.2g})"
    return f"The learning rate looks about {times}: {agree}."


def _few(analysis: Analysis) -> str | None:
    if "line_skill" not in analysis.missing:
        return None
    count = len(analysis.steps)
    have = f"Only {count} checkpoint{'s' if count > 1 else ''}" if count < 4 else f"{count} checkpoints"
    return f"{have}: no out-of-sample figures ({analysis.missing['line_skill']})."


def _direction(group: Group) -> str | None:
    figure = group.figures.get("cosine_local")
    if figure is None or figure.value is None:
        return None
    if figure.outside == "above":
        says = "Motion goes straight on" if figure.value >= 0.5 else "Motion keeps part of its direction"
    elif figure.outside == "below":
        says = "Motion turns back on itself"
    else:
        says = "Successive steps cannot be told from a random walk"
    return f"{says}: median cosine of successive local deltas {number(figure.value)}{_null(figure)}."


def _forward(analysis: Analysis) -> str | None:
    figure = analysis.overall.figures.get("pinned_skill")
    if figure is None or figure.value is None:
        return None
    ahead = f"{analysis.horizon} steps ahead"
    if figure.value > 0.0:
        says = f"A line fitted to the past and continued {ahead} removes {100 * figure.value:.0f}% of the squared error"
        return f"{says} of staying put{_null(figure, ' skill')}."
    says = f"A line fitted to the past and continued {ahead} is worse than staying put"
    return f"{says}: skill {number(figure.value)}{_null(figure)}."


def _in_sample(group: Group) -> str | None:
    figure = group.figures.get("c1_r2")
    if figure is None or figure.value is None or figure.null is None:
        return None
    return (
        f"The in-sample R2 of the leading time component, {number(figure.value)}, is weak evidence of a line: "
        f"a random walk has {number(figure.null.mean)}."
    )


def _rank(group: Group) -> str | None:
    figure = group.figures.get("squared_energy_ratio_global")
    if figure is None or figure.value is None:
        return None
    nearly = "nearly" if figure.value >= RANK_ONE else "not"
    share = f"the first singular triplet carries {100 * figure.value:.0f}% of the energy"
    return f"The newest deltas are {nearly} of rank 1: {share}{_null(figure)}."


def _speed(group: Group) -> str | None:
    value = group.value("speed_ratio")
    if value is None or SLOW <= value <= FAST:
        return None
    changes = "slows down" if value < 1 else "speeds up"
    return f"Motion {changes}: the last third of the run goes at {value:.2f} times the pace of the first."


def _precision(analysis: Analysis) -> str | None:
    found = analysis.precision
    if found is None or not found.drowned:
        return None
    return (
        f"Checkpoints are stored too coarsely for {len(found.drowned)} of {len(found.delta_to_ulp)} matrices: from "
        f"step {found.since} to {found.step} the rank-1 signal drowns in rounding. Take deltas of LoRA factors or of "
        "fp32 checkpoints, or checkpoints that lie further apart."
    )


def _null(figure: Figure, what: str = "") -> str:
    return _walk(figure.null, what)


def _walk(null: Null | None, what: str = "") -> str:
    if null is None:
        return ""
    return f" (random walk{what} {number(null.mean)}, 95% {number(null.low)} to {number(null.high)})"
