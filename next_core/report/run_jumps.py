"""The jumps of a run: each, why the guards decided as they did, and what came of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from next_core.diagnostics.drawing import Drawing
from next_core.report.compare_pictures import draw_multiples
from next_core.report.inputs import Jump, Recorded
from next_core.report.page import Block, Cell, Columns, Missing, Picture, Single, Table, Text
from next_core.report.run_pictures import draw_effects
from next_core.report.words import NOTHING, counted, figure, mean, reasons, signed, steps_of, whole

MOST_ROWS = 30
"""More jumps than these are shown in groups."""
GROUPS = 12
GUARDS = (
    "A jump is refused where it is longer than max_norm_ratio times the motion of the last horizon steps. It is taken "
    "back where accuracy falls by more than max_drop right after it, or, with recovery, is not back some steps later."
)


def jump_blocks(recorded: Recorded) -> list[Block]:
    """Every jump, or groups of them; the decisions with their reasons; what jumps did."""
    jumps = recorded.jumps
    if not jumps:
        return [Missing("Jumps", "none was tried")]
    blocks: list[Single] = [_table(jumps) if len(jumps) <= MOST_ROWS else _grouped(jumps)]
    rows: list[list[Cell | str]] = []
    for verdict, some in (
        ("made", [j for j in jumps if j.accepted]),
        ("refused", [j for j in jumps if not j.accepted]),
    ):
        rows += [[verdict, whole(len(alike)), steps_of(alike), reason] for reason, alike in reasons(some)]
    words = ["decision", "when", "reason"]
    blocks.append(Table("Decisions of the guards, and why", ["decision", "jumps", "when", "reason"], rows, words=words))
    effects = draw_effects(jumps)
    if isinstance(effects, Drawing):
        changes = [
            jump.accuracy_after - jump.accuracy_before
            for jump in jumps
            if jump.accuracy_before is not None and jump.accuracy_after is not None
        ]
        told = f"on average {signed(mean(changes))} over {counted(len(changes), 'probed jump')}"
        caption = f"Accuracy of the probe right after a jump, minus that right before it: {told}."
        blocks.append(Picture(effects, caption, f"Change of accuracy at each jump, {told}"))
    multiples = draw_multiples({recorded.predictor: [jumps]})
    if isinstance(multiples, Drawing):
        most = max(jump.diagnostics.get("multiple") or 0.0 for jump in jumps)
        caption = "Multiple of the observed motion that each jump aims at; 1 is no jump."
        blocks.append(Picture(multiples, caption, f"{caption} At most {figure(most, 1)}"))
    return [Columns(blocks), Text(GUARDS, aside=True)]


def _table(jumps: Sequence[Jump]) -> Table:
    rows: list[list[Cell | str]] = [
        [
            whole(jump.step),
            jump.predictor or NOTHING,
            NOTHING if jump.alpha is None else f"{jump.alpha:g}",
            figure(jump.norm_ratio, 2),
            figure(jump.accuracy_before),
            figure(jump.accuracy_after),
            *([figure(jump.accuracy_recovered)] if _recovered(jumps) else []),
            ("made" if jump.accepted else "refused"),
        ]
        for jump in jumps
    ]
    headings = ["step", "predictor", "alpha", "norm", "before", "after"]
    headings += ["recovered", "decision"] if _recovered(jumps) else ["decision"]
    notes = ["Norm: over that of the motion just before. Before, after: accuracy on the validation prompts."]
    return Table("Every jump that was tried", headings, rows, words=["predictor", "decision"], notes=notes)


def _recovered(jumps: Sequence[Jump]) -> bool:
    return any(jump.accuracy_recovered is not None for jump in jumps)


def _grouped(jumps: Sequence[Jump]) -> Table:
    """So many neighbouring jumps a row."""
    size = math.ceil(len(jumps) / GROUPS)
    rows: list[list[Cell | str]] = []
    for first in range(0, len(jumps), size):
        some = jumps[first : first + size]
        made = [jump for jump in some if jump.accepted]
        rows.append(
            [
                f"{some[0].step} to {some[-1].step}" if len(some) > 1 else str(some[0].step),
                whole(len(some)),
                whole(len(made)),
                whole(len(some) - len(made)),
                figure(mean([jump.norm_ratio for jump in made]), 2),
                figure(mean([jump.accuracy_before for jump in some])),
                figure(mean([jump.accuracy_after for jump in some])),
            ]
        )
    headings = ["steps", "tried", "made", "refused", "mean norm", "mean before", "mean after"]
    notes = [
        "Norm: of the jumps that were made, over that of the motion just before. Before, after: accuracy on the "
        "validation prompts. The journal has each jump."
    ]
    caption = f"{counted(len(jumps), 'jump')} that were tried, {size} a row"
    return Table(caption, headings, rows, notes=notes)
