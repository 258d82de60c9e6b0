"""A few plain sentences on what the figures mean, each with the figure and its null."""

from __future__ import annotations

from collections.abc import Iterator

from next_core.diagnostics.analysis_results import Analysis, number
from next_core.diagnostics.learning_rate import learning_rate_advice, null_in_words

RANK_ONE = 0.9
"""From this share of the energy on, one singular triplet describes nearly all of a delta."""
SLOW, FAST = 0.67, 1.5


def advice(analysis: Analysis) -> tuple[str, ...]:
    """Return one sentence for each figure that is there and means something."""
    if not analysis.matrices:
        return ("No matrix moved over the last interval: check that training changes the weights.",)
    return tuple(_sentences(analysis))


def _sentences(analysis: Analysis) -> Iterator[str]:
    figures = {name: figure for name, figure in analysis.overall.figures.items() if figure.value is not None}
    if "line_skill" in analysis.missing:
        count = len(analysis.steps)
        have = f"Only {count} checkpoint{'s' if count > 1 else ''}" if count < 4 else f"{count} checkpoints"
        yield f"{have}: no out-of-sample figures ({analysis.missing['line_skill']})."
    if (found := figures.get("cosine_local")) and found.value is not None:
        motion = "Successive steps cannot be told from a random walk"
        if found.outside == "above":
            motion = "Motion goes straight on" if found.value >= 0.5 else "Motion keeps part of its direction"
        elif found.outside == "below":
            motion = "Motion turns back on itself"
        null = null_in_words(found.null)
        yield f"{motion}: median cosine of successive local deltas {number(found.value)}{null}."
    if sentence := learning_rate_advice(analysis.learning_rate):
        yield sentence
    if (found := figures.get("pinned_skill")) and found.value is not None:
        line = f"A line fitted to the past and continued {analysis.horizon} steps ahead"
        if found.value > 0.0:
            gain, null = f"{100 * found.value:.0f}% of the squared error", null_in_words(found.null, " skill")
            yield f"{line} removes {gain} of staying put{null}."
        else:
            yield f"{line} is worse than staying put: skill {number(found.value)}{null_in_words(found.null)}."
    if (found := figures.get("c1_r2")) and found.value is not None and found.null is not None:
        yield (
            f"The in-sample R2 of the leading time component, {number(found.value)}, is weak evidence of a line: "
            f"a random walk has {number(found.null.mean)}."
        )
    if (found := figures.get("squared_energy_ratio_global")) and found.value is not None:
        nearly = "nearly" if found.value >= RANK_ONE else "not"
        share = f"the first singular triplet carries {100 * found.value:.0f}% of the energy"
        yield f"The newest deltas are {nearly} of rank 1: {share}{null_in_words(found.null)}."
    if (found := figures.get("speed_ratio")) and found.value is not None and not SLOW <= found.value <= FAST:
        changes = "slows down" if found.value < 1 else "speeds up"
        yield f"Motion {changes}: the last third of the run moves {found.value:.2f} times as fast as the first."
    if analysis.precision is not None and analysis.precision.drowned:
        stored = analysis.precision
        yield (
            f"Checkpoints are stored too coarsely for {len(stored.drowned)} of {len(stored.delta_to_ulp)} matrices: "
            f"from step {stored.since} to {stored.step} rounding drowns the rank-1 signal. Store LoRA factors or fp32 "
            "checkpoints, or compare checkpoints that are further apart."
        )
