"""Advice at the end of a run. The function that computes it is passed in: diagnostics are a layer above the cycle."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.scaling import scaling_records
from next_core.errors import describe
from next_core.interfaces import CheckpointSource

Advise = Callable[[CheckpointSource, Sequence[Mapping[str, Any]]], str | None]
"""From a run's checkpoints and its journalled jumps to one sentence, or None when there is nothing to advise."""

WORTH_SAYING = 1.5  # A learning rate that differs from the configured one by less is not worth a change


def rate_found(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return which learning rate step scaling chose, from its records; None where it is the configured one.

    The largest rate at which motions still agreed and the one at the end bound what a constant rate should be.
    """
    made = [record for record in records if record["event"] == "scale" and record["accepted"]]
    found = [record for record in made if record.get("found")]
    if not made:
        return None
    last = made[-1]
    if not found and last["multiple"] < WORTH_SAYING:
        return None
    if not found:
        return (
            f"Train longer, or start from learning_rate {last['rate']:.2g}. Step scaling was still raising it at the "
            f"end (to {last['multiple']:.2g} times the configured one): the run was too short to find the best."
        )
    rates, multiple = [record["rate"] for record in found], found[0]["multiple"]
    if 1 / WORTH_SAYING < multiple < WORTH_SAYING:
        return None
    verb = "Raise" if multiple > 1 else "Lower"
    used = f"{min(rates):.2g} to {max(rates):.2g}"
    return (
        f"{verb} learning_rate to about {rates[0]:.2g}. Step scaling used {used} once it had found the rate at which "
        "steps stop agreeing; a run at that rate saves the steps that finding it took."
    )


def journal_advice(cycle: PredictExtendCycle, advise: Advise | None, step: int) -> str | None:
    """Return the advice after ``step`` and journal it. A failure is journalled too: it must not fail the run."""
    journal, source = cycle.journal, None
    if not cycle.scales_steps:
        if advise is None:
            return None
        source = cycle.backend.source()  # raises at the latest here if a checkpoint could not be written
        if source.begins:
            return None  # the learning rate is judged by motions of the whole run
    try:
        text = (
            rate_found(scaling_records(journal))
            if advise is None or source is None
            else advise(source, journal.jumps())
        )
    except Exception as error:
        journal.append("advice", step, problem=describe(error))
        return None
    if text is not None:
        journal.append("advice", step, text=text)
    return text
