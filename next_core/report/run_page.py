"""The page of one run."""

from __future__ import annotations

from next_core.diagnostics.drawing import Drawing
from next_core.report.compare_pictures import Over
from next_core.report.geometry import GeometryOptions, geometry_sections
from next_core.report.inputs import Recorded, Result
from next_core.report.page import (
    Block,
    Cell,
    Code,
    Columns,
    Facts,
    Missing,
    Page,
    Picture,
    Section,
    Single,
    Table,
    Text,
    Tile,
)
from next_core.report.run_jumps import jump_blocks
from next_core.report.run_pictures import draw_progress, draw_reward
from next_core.report.words import NOTHING, counted, figure, mean, seconds, whole
from next_core.types import Progress

PARTS = {
    "setup": "starting the trainer",
    "rl": "RL steps",
    "ours_observe": "next-core: checkpoints",
    "ours_predict": "next-core: predicting",
    "ours_extend": "next-core: writing jumps",
    "ours_probe": "next-core: probes of the guards",
    "measuring": "measuring accuracy",
}


def run_page(recorded: Recorded, title: str, settings: GeometryOptions, progress: Progress | None = None) -> Page:
    """Everything that a run's folder says, for a colleague to read."""
    return Page(
        title=title,
        subtitle=_subtitle(recorded),
        summary=_summary(recorded),
        tiles=_tiles(recorded),
        sections=[
            Section("accuracy", "Accuracy", _accuracy(recorded)),
            Section("jumps", "Jumps and guards", jump_blocks(recorded)),
            *geometry_sections(recorded, settings, progress),
            Section("time", "Where the time went", _time(recorded)),
            Section("setup", "Setup", _setup(recorded)),
        ],
    )


def _seed(recorded: Recorded) -> str:
    named = None if recorded.result is None else recorded.result.settings.get("seed")
    known = recorded.started.get("seed") if named is None else named
    return "not recorded" if known is None else str(known)


def _subtitle(recorded: Recorded) -> str:
    result = recorded.result
    if result is None:
        ended = any(record["event"] == "end" for record in recorded.events)
        state = "ended" if ended else f"last known step {recorded.last_step}"
        return f"Run without a result: {state}, predictor {recorded.predictor}"
    algorithm = str(result.settings.get("algorithm", "RL"))
    return f"Run of {result.steps} {algorithm.upper()} steps, predictor {recorded.predictor}, seed {_seed(recorded)}"


def _plain_end(recorded: Recorded) -> float | None:
    control = None if recorded.result is None else recorded.result.control
    return None if control is None else control.accuracy.get("final")


def _summary(recorded: Recorded) -> list[str]:
    told = []
    start, end, plain = recorded.accuracy("start"), recorded.accuracy("final"), _plain_end(recorded)
    result = recorded.result
    if result is not None and start is not None and end is not None:
        beside = (
            ""
            if plain is None
            else f"; the plain run of the same seed ended at {figure(plain)}, {figure(abs(end - plain))} "
            f"{'below' if end >= plain else 'above'} it. One seed says little about small differences"
        )
        told.append(f"In {result.steps} RL steps test accuracy went from {figure(start)} to {figure(end)}{beside}.")
        told += _greedy(result)
    elif result is None:
        told.append(
            f"There is no result: the run goes on, was stopped, or was driven by the TRL callback. What follows is "
            f"what is known up to step {recorded.last_step}."
        )
    else:
        told.append(f"The run of {result.steps} RL steps has ended; no accuracy was measured.")
    made = [jump for jump in recorded.jumps if jump.accepted]
    refused = len(recorded.jumps) - len(made)
    if not recorded.jumps:
        told.append("No jump was tried.")
    else:
        norm = mean([jump.norm_ratio for jump in made])
        size = "" if norm is None else f", on average {figure(norm, 1)} times as long as the motion just before"
        told.append(
            f"{counted(len(recorded.jumps), 'jump')} tried: {len(made)} made{size}; {refused or 'none'} refused."
        )
    return told


def _greedy(result: Result) -> list[str]:
    """The accuracy of greedy answers where it was measured too: it need not go the same way."""
    if not result.curve:
        return []
    start, end = (result.curve[place].test.get("greedy") for place in (0, -1))
    if start is None or end is None or "sampled" not in result.curve[-1].test:
        return []
    curve = [] if result.control is None else result.control.curve
    plain = curve[-1].test.get("greedy") if curve else None
    beside = "" if plain is None else f"; that of the plain run ended at {figure(plain)}"
    return [
        f"This is of sampled answers. The accuracy of greedy ones went from {figure(start)} to {figure(end)}{beside}."
    ]


def _tiles(recorded: Recorded) -> list[Tile]:
    tiles = []
    for value, words in (
        (recorded.accuracy("start"), "test accuracy at the start"),
        (recorded.accuracy("final"), "at the end"),
        (_plain_end(recorded), "plain run, same seed"),
    ):
        if value is not None:
            tiles.append(Tile(figure(value), words))
    made = sum(jump.accepted for jump in recorded.jumps)
    tiles.append(Tile(f"{made} of {len(recorded.jumps)}", "jumps made of those tried"))
    if recorded.result is not None and "total" in recorded.result.seconds:
        tiles.append(Tile(seconds(recorded.result.seconds["total"]), "in all"))
    return tiles


def _accuracy(recorded: Recorded) -> list[Block]:
    blocks: list[Block] = []
    names = ("start", "before_jump", "after_jump", "final")
    values = [recorded.accuracy(name) for name in names]
    if any(value is not None for value in values):
        steps = recorded.result.steps if recorded.result is not None else recorded.last_step
        rows: list[list[Cell | str]] = [["with jumps", whole(steps), *(figure(value) for value in values)]]
        result = recorded.result
        if result is not None and result.control is not None:
            control = result.control
            end = control.accuracy.get("final")
            rows.append(["plain, same seed", whole(control.steps), figure(values[0]), NOTHING, NOTHING, figure(end)])
        headings = ["run", "RL steps", "start", "before first jump", "right after", "end"]
        blocks.append(Table("Accuracy on the test prompts", headings, rows, words=["run"]))
    else:
        blocks.append(Missing("Accuracy on the test prompts", "none was measured"))
    pictures: list[Single] = []
    overs: tuple[Over, ...] = ("steps", "seconds")
    for over in overs:
        drawn = draw_progress(recorded, over)
        if isinstance(drawn, Drawing):
            ticks = " Ticks: jumps made; crosses: refused." if over == "steps" and recorded.jumps else ""
            what = "RL steps" if over == "steps" else "seconds of training (measuring left out)"
            pictures.append(Picture(drawn, f"Test accuracy over {what}.{ticks}", _curve_words(recorded, what)))
        elif over == "steps":
            blocks.append(Missing("Accuracy along the run", drawn))
    if not pictures:
        reward = draw_reward(recorded)
        if isinstance(reward, Drawing):
            logged = [numbers["reward"] for numbers in recorded.metrics.values() if "reward" in numbers]
            told = f"Reward over RL steps, from {figure(logged[0])} to {figure(logged[-1])}"
            ticks = " Ticks: jumps made; crosses: refused." if recorded.jumps else ""
            pictures.append(Picture(reward, f"Reward of the roll-outs, as the trainer logged it.{ticks}", told))
        else:
            blocks.append(Missing("Reward along the run", reward))
    if pictures:
        blocks.append(Columns(pictures))
    return blocks


def _curve_words(recorded: Recorded, over: str) -> str:
    first, last = recorded.curve[0], recorded.curve[-1]
    ways = [
        f"{way} from {figure(first.test.get(way))} at step {first.step} to {figure(value)} at step {last.step}"
        for way, value in last.test.items()
    ]
    return f"Test accuracy over {over}: {'; '.join(ways)}"


def _time(recorded: Recorded) -> list[Block]:
    if recorded.result is None or not recorded.result.seconds:
        return [Missing("Time", "only a run that ended, and that a config made, has it")]
    spent = recorded.result.seconds
    parts = [(words, spent[part]) for part, words in PARTS.items() if part in spent]
    control = recorded.result.control
    if control is not None and control.seconds is not None:
        parts.append(("the plain run", control.seconds))
    total = spent.get("total", sum(value for _, value in parts))
    rest = total - sum(value for _, value in parts)
    if rest > 0.005 * total:
        parts.append(("everything else, such as starting the plain run", rest))
    rows: list[list[Cell | str]] = [[words, seconds(value), _share(value, total)] for words, value in parts]
    rows.append(["in all", Cell(seconds(total), strong=True), ""])
    return [Table("Wall-clock time of the run", ["what", "time", "share"], rows, words=["what"])]


def _share(value: float, total: float) -> Cell:
    share = min(max(value / total, 0.0), 1.0) if total > 0 else 0.0
    return Cell(f"{100 * share:.1f}%", share=share)


def _setup(recorded: Recorded) -> list[Block]:
    facts = [("predictor", recorded.predictor), ("seed", _seed(recorded))]
    result = recorded.result
    if result is not None and result.resumed_from is not None:
        facts.append(("resumed from step", str(result.resumed_from)))
    if result is not None:
        facts += [("hardware", result.hardware or "not recorded"), *sorted(result.versions.items())]
    blocks: list[Block] = [Facts(facts)]
    schedule = recorded.started.get("schedule")
    if isinstance(schedule, dict):
        blocks.append(Facts([(str(key), NOTHING if value is None else str(value)) for key, value in schedule.items()]))
    if result is not None:
        blocks += [Text(f"Note: {note}.") for note in result.notes]
    if recorded.config is None:
        blocks.append(Missing("Config", "the folder has no config.yaml: the run was made by a script"))
    else:
        blocks.append(Code(recorded.config, "config.yaml, every setting resolved"))
    return blocks
