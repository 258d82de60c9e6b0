"""A few plain sentences on what the figures mean, each with the figure and its null."""

from __future__ import annotations

from collections.abc import Iterator

from next_core.diagnostics.analysis_results import Analysis
from next_core.diagnostics.figures import Figure, number
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
    def found(name: str) -> tuple[float | None, str]:
        figure = analysis.overall.figures.get(name, Figure(None))
        return figure.value, null_in_words(figure.null)

    if "line_skill" in analysis.missing:
        count = len(analysis.steps)
        have = f"{'Only ' * (count < 4)}{count} checkpoint{'s' * (count > 1)}"
        yield f"{have}: no out-of-sample figures ({analysis.missing['line_skill']})."
    value, null = found("cosine_local")
    if value is not None:
        motion = {
            "above": "Motion goes straight on" if value >= 0.5 else "Motion keeps part of its direction",
            "below": "Motion turns back on itself",
            None: "Successive steps cannot be told from a random walk",
        }[analysis.overall.figures["cosine_local"].outside]
        yield f"{motion}: median cosine of successive local deltas {number(value)}{null}."
    if sentence := learning_rate_advice(analysis.learning_rate):
        yield sentence
    value, null = found("pinned_skill")
    if value is not None:
        line = f"A line fitted to the past and continued {analysis.horizon} steps ahead"
        gain = f"removes {100 * value:.0f}% of the squared error of" if value > 0 else "is worse than"
        yield f"{line} {gain} staying put: skill {number(value)}{null}."
    value, null = found("c1_r2")
    if value is not None and null:
        yield f"The in-sample R2 of the leading time component, {number(value)}, is weak evidence of a line{null}."
    value, null = found("squared_energy_ratio_global")
    if value is not None:
        nearly = "nearly" if value >= RANK_ONE else "not"
        share = f"the first singular triplet carries {100 * value:.0f}% of the energy"
        yield f"The newest deltas are {nearly} of rank 1: {share}{null}."
    value, _ = found("speed_ratio")
    if value is not None and not SLOW <= value <= FAST:
        changes = "slows down" if value < 1 else "speeds up"
        yield f"Motion {changes}: the last third of the run moves {value:.2f} times as fast as the first."
    if analysis.precision is not None and analysis.precision.drowned:
        stored = analysis.precision
        yield (
            f"Checkpoints are stored too coarsely for {len(stored.drowned)} of {len(stored.delta_to_ulp)} matrices: "
            f"from step {stored.since} to {stored.step} rounding drowns the rank-1 signal. Store LoRA factors or fp32 "
            "checkpoints, or compare checkpoints that are further apart."
        )
