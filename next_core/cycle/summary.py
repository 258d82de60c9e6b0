"""What a run did, in sentences: for the command line, the report and the end of a training."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from next_core.cycle.journal import counted_records, valid_jumps
from next_core.cycle.scaling import EVENTS

Record = Mapping[str, Any]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
LIST = re.compile("#(?:, #)+")
MOST_REFUSALS = 3  # Kinds of refusals that a summary lists


def counted(count: int, what: str) -> str:
    """Return ``1 jump`` or ``2 jumps``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def without_numbers(reason: str) -> str:
    """Return the kind of a reason: those that differ only in their numbers, or in how many they list, are alike."""
    return LIST.sub("#", NUMBER.sub("#", reason))


def done_text(jumps: Sequence[Record], scaling: Sequence[Record]) -> str:
    """Return what the jumps or the step scaling of a run did, from its records."""
    return scaling_text(scaling) if scaling else jumps_text(jumps)


def scaling_text(records: Sequence[Record]) -> str:
    """Return what step scaling did, in one sentence."""
    made = [record for record in records if record.get("accepted", True)]
    if not made:
        return "Step scaling: no multiple was accepted; the journal has the reasons."
    rates, back = [record["rate"] for record in made], [one for one in made if one.get("back_to") is not None]
    undone = "".join(f", back to step {record['back_to']} after step {record['step']}" for record in back)
    return (
        f"Step scaling: learning rate {rates[0]:.2g} at first, at most {max(rates):.2g}, {rates[-1]:.2g} last{undone}."
    )


def jumps_text(jumps: Sequence[Record]) -> str:
    """Return how many jumps were made and refused, and how long they were."""
    if not jumps:
        return "No jump was attempted."
    made = [jump for jump in jumps if jump["accepted"]]
    norms = [jump["norm_ratio"] for jump in made if jump.get("norm_ratio") is not None]
    size = f", on average {sum(norms) / len(norms):.1f} times as long as the update just before" if norms else ""
    refused = len(jumps) - len(made) or "none"
    return f"{counted(len(jumps), 'jump')} attempted: {len(made)} made{size}; {refused} refused."


def average_text(record: Record) -> str:
    """Return whether a run ended in the mean of its last checkpoints, and what that changed."""
    before = record.get("accuracy_before")
    after = [value for value in (record.get("tried") or {}).values() if value is not None]
    measured = "" if before is None or not after else f" (validation accuracy {before:.3f}, the mean {max(after):.3f})"
    used = "used" if record["accepted"] else "not used"
    return f"Average of the last checkpoints {used}: {record['reason']}{measured}"


def summary(records: Sequence[Record], metrics: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Return what a run did and gained so far, a sentence each, from its journal and the trainer's metrics by step."""
    records = counted_records(records)
    jumps, scaling = valid_jumps(records), [record for record in records if record["event"] in EVENTS]
    lines = [done_text(jumps, scaling)]
    refused: dict[str, list[Record]] = {}
    for record in (*jumps, *scaling):
        if not record.get("accepted", True):
            refused.setdefault(without_numbers(record["reason"]), []).append(record)
    often = sorted(refused.values(), key=len, reverse=True)[:MOST_REFUSALS]
    lines += [f"Refused {counted(len(alike), 'time')}: {alike[-1]['reason']}" for alike in often]
    lines += [average_text(record) for record in records if record["event"] == "average"]
    best = [record["loaded"] for record in records if record["event"] == "best"]
    lines += [f"load_best_model_at_end: the weights are those of step {step}" for step in best]
    for what, known in measured(records, metrics).items():
        if len(known) > 1:
            (first, start), *_, (last, end) = sorted(known.items())
            lines.append(f"{what}: {start:.3f} after step {first}, {end:.3f} after step {last}")
    return [*lines, *(f"Hint: {text}" for text in advice_texts(records))]


def ends(known: Mapping[int, float], what: str) -> tuple[float, float]:
    """Return the first and the last value; of rewards, which are noisy, the mean of the first and the last tenth."""
    values = [known[step] for step in sorted(known)]
    some = len(values) // 10 or 1 if what == "Reward" else 1
    return fmean(values[:some]), fmean(values[-some:])


def advice_texts(records: Sequence[Record]) -> list[str]:
    """Return the advice that a run's journal has: first what to do, then why."""
    return [record["text"] for record in records if record["event"] == "advice" and "text" in record]


def measured(records: Sequence[Record], metrics: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Return what shows how good a run is, by step; what says most comes first."""
    tested = [record for record in records if record["event"] == "accuracy" and record["value"] is not None]
    return {
        "Test accuracy": {record["step"]: record["value"] for record in tested},
        "Validation accuracy": probed_accuracies(records),
        "Reward": {step: numbers["reward"] for step, numbers in metrics.items() if "reward" in numbers},
    }


def outcome(
    records: Sequence[Record], metrics: Mapping[int, Mapping[str, float]], steps: int, last: int, plain: float | None
) -> str:
    """Return how a run ended, in one sentence: what it gained in ``last`` of ``steps``, and against what."""
    records = counted_records(records)
    ended = any(record["event"] == "end" for record in records)
    when = (
        f"In {last} RL steps" if ended else f"Up to step {last} of {steps or '?'}, where the run stopped or still is,"
    )
    for what, known in measured(records, metrics).items():
        if len(known) > 1:
            start, end = ends(known, what)
            verb = "went" if abs(end - start) < 0.0005 else "rose" if end > start else "fell"
            against = (
                "" if plain is None or what != "Test accuracy" else f"; plain RL with the same seed reached {plain:.3f}"
            )
            return f"{when} {what.lower()} {verb} from {start:.3f} to {end:.3f}{against}."
    return f"{when} neither accuracy nor reward was measured."


def probed_accuracies(records: Sequence[Record]) -> dict[int, float]:
    """Return the probes by step: of each step the first, which no trial had changed, and at the end the chosen mean."""
    found: dict[int, float] = {}
    for record in records:
        tried = [value for value in (record.get("tried") or {}).values() if value is not None]
        if record["event"] == "probe" and record["accuracy"] is not None:
            found.setdefault(record["step"], record["accuracy"])
        elif record["event"] == "average" and record["accepted"] and tried:
            found[record["step"]] = max(tried)
    return found
