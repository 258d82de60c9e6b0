"""`auto` beside plain RL at every learning rate and task: one policy, nothing tuned.

    python benchmarks/rates.py            # runs what benchmarks/results/rates.json lacks, then the tables
    python benchmarks/rates.py --table    # only writes the tables of docs/benchmarks/auto.md anew

250 RL steps each, the seeds paired. Accuracy is exact (the probability of the right answer, by teacher forcing) on 1024
held-out prompts. A plain run takes the mean of its last checkpoints at the end as `auto` does, and is reported before
and after it, so that what jumps give and what the mean gives can be told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tables import RESULTS, ROOT, interval, mean, put, table
from tasks import RESULTS as TASK_RESULTS
from tasks import TASKS

EXAMPLES = ROOT / "examples"
FILE = RESULTS / "rates.json"

STEPS = 250
RATES = (1e-3, 1e-4, 3e-4, 3e-5)
NO_PROBE = {"probe": False}
WATCHED = {"observe": 20, "every": 2, "horizon": 2, "average": 80}
"""The checkpoints and the mean of `auto`."""
ARMS: dict[str, dict[str, Any]] = {
    "auto": {"predictor": "auto"},
    "plain": {"predictor": "stay", "schedule": WATCHED, "guards": NO_PROBE},
    "linear": {"predictor": "stay", "guards": NO_PROBE},
    "per matrix": {"predictor": {"name": "auto", "per_matrix": True}},
}
ARM_RATES = {"auto": RATES, "plain": (*RATES, 2e-3), "linear": (1e-3, 2e-3), "per matrix": (1e-3, 1e-4)}
ARM_SEEDS = {"linear": 3, "per matrix": 2}
"""Where fewer than the others'."""
SETTINGS: dict[str, dict[str, Any]] = {
    "4 prompts a step": {"prompts_per_step": 4},
    "LoRA rank 2": {"lora": {"rank": 2, "alpha": 4}},
    "LoRA rank 32": {"lora": {"rank": 32, "alpha": 64}},
    "full parameters": {"lora": None},
    "RLOO": {"algorithm": "rloo"},
    "REINFORCE++": {"algorithm": "reinforce++"},
}
"""What the arithmetic task is run with besides, at two rates."""
SETTING_RATES = (1e-4, 1e-3)
SETTING_SEEDS = 2
Key = tuple[str, float, int, str, str]
Row = dict[str, Any]
By = dict[tuple[str, float, str], dict[int, Row]]


def run_one(task: str, rate: float, seed: int, arm: str, setting: str = "") -> Row:
    """One training run. The config of `auto` says no more than the task and the rate."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))  # where the rewards lie
    from next_core.checkpoints import open_checkpoints
    from next_core.config import make_config
    from next_core.cycle.run import run
    from next_core.diagnostics import learning_rate_factor, with_origin
    from next_core.diagnostics.learning_rate import run_advice
    from next_core.history.history import History

    folder = EXAMPLES / task
    training = TASKS[task] | {
        "model": str(folder / "base"),
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "learning_rate": rate,
        "lr_scheduler": "linear" if arm == "linear" else "constant",
        **SETTINGS.get(setting, {}),
    }
    config = make_config({"steps": STEPS, "seed": seed, "training": training, **ARMS[arm]})
    with tempfile.TemporaryDirectory() as out:
        result = run(config, Path(out) / "run", advise=run_advice)
        source = with_origin(open_checkpoints(Path(out) / "run" / "checkpoints"))
        advised = learning_rate_factor(History(source), result.jumps)
    jumps = [jump for jump in result.jumps if jump["accepted"]]
    return {
        "task": task,
        "learning_rate": rate,
        "seed": seed,
        "arm": arm,
        "setting": setting,
        "start": round(result.accuracy["start"] or 0.0, 4),
        "before_average": _rounded(result.accuracy.get("before_average"), 4),
        "final": _rounded(result.accuracy["final"], 4),
        "average": None if result.average is None else result.average["reason"],
        "jumps": len(jumps),
        "multiples": {
            jump["step"]: round(jump["diagnostics"]["multiple"], 2) for jump in jumps if arm in ("auto", "per matrix")
        },
        "agreement": _rounded(advised.agreement),
        "factor": _rounded(advised.factor),
        "multiple": _rounded(advised.multiple),
        "seconds": {key: round(value, 2) for key, value in result.seconds.items()},
    }


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def missing(rows: list[Row], seeds: int) -> list[Key]:
    """The first seed of everything before the second of anything."""
    have = {(row["task"], row["learning_rate"], row["seed"], row["arm"], row["setting"]) for row in rows}
    wanted = [(t, rate, s, arm, "") for s in range(seeds) for t in TASKS for arm in ARMS for rate in ARM_RATES[arm]]
    wanted = [key for key in wanted if key[2] < ARM_SEEDS.get(key[3], seeds)]
    wanted += [
        ("arithmetic", rate, seed, arm, setting)
        for seed in range(min(seeds, SETTING_SEEDS))
        for setting in SETTINGS
        for rate in SETTING_RATES
        for arm in ("auto", "plain")
    ]
    return [key for key in wanted if key not in have]


def by_arm(rows: list[Row], setting: str = "") -> By:
    """Rows of one setting by task, rate and arm, and in each by seed."""
    found: By = {}
    for row in (row for row in rows if row["setting"] == setting):
        found.setdefault((row["task"], row["learning_rate"], row["arm"]), {})[row["seed"]] = row
    return found


def plain_finals(found: By, task: str) -> dict[float, dict[int, float]]:
    """Of the constant rates, by seed: where plain runs end without the mean."""
    rates = (rate for rate in ARM_RATES["plain"] if (task, rate, "plain") in found)
    return {rate: {seed: row["before_average"] for seed, row in found[task, rate, "plain"].items()} for rate in rates}


def every_rate(found: By) -> str:
    """Each task and rate: means over the seeds that both arms have, and their paired differences."""
    rows = []
    for task in TASKS:
        for rate in sorted(RATES):
            plain, auto = (found.get((task, rate, arm), {}) for arm in ("plain", "auto"))
            seeds = sorted(plain.keys() & auto.keys())
            if not seeds:
                continue
            ours = [auto[seed]["final"] for seed in seeds]
            bare, averaged = ([plain[seed][key] for seed in seeds] for key in ("before_average", "final"))
            advised = [row["factor"] for row in plain.values() if row["factor"] is not None]
            rows.append(
                [
                    task,
                    f"{rate:g}",
                    mean(bare),
                    mean(averaged),
                    mean(ours),
                    interval([a - b for a, b in zip(ours, bare, strict=True)]),
                    interval([a - b for a, b in zip(ours, averaged, strict=True)]),
                    f"{statistics.median(advised):.2g}" if advised else "",
                    str(len(seeds)),
                ]
            )
    headings = "task|learning rate|plain|plain, mean at the end|auto|auto - plain, 95%|auto - plain with mean, 95%"
    return table([*headings.split("|"), "advised factor", "seeds"], rows)


def conservative(found: By) -> str:
    """Aim (a): 250 steps of `auto` at 1e-4 beside 400 plain ones, of the same seeds."""
    curves = json.loads(TASK_RESULTS.read_text())["rows"]
    rows = []
    for task in TASKS:
        longer = {r["seed"]: r["curve"][-1] for r in curves if (r["task"], r["learning_rate"]) == (task, 1e-4)}
        auto = found.get((task, 1e-4, "auto"), {})
        seeds = sorted(longer.keys() & auto.keys())
        if seeds:
            ours = [auto[seed]["final"] for seed in seeds]
            theirs = [longer[seed] for seed in seeds]
            difference = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            rows.append([task, mean(theirs), mean(ours), difference, str(len(seeds))])
    return table(["task", "plain, 400 steps", "auto, 250 steps", "auto - plain, 95%", "seeds"], rows)


def tuned(found: By) -> str:
    """Aims (b) and (c): `auto` at each rate beside the best constant rate, schedule, and mean at the end."""
    rows = []
    for task in TASKS:
        kinds = {"constant {:g}": plain_finals(found, task)}
        for name, arm, rates in (
            ("linear decay from {:g}", "linear", ARM_RATES["linear"]),
            ("constant {:g}, mean at the end", "plain", [rate for rate in ARM_RATES["plain"] if rate >= 1e-3]),
        ):
            runs = {rate: found.get((task, rate, arm), {}) for rate in rates}
            kinds[name] = {rate: {seed: row["final"] for seed, row in of.items()} for rate, of in runs.items() if of}
        for name, by_rate in kinds.items():
            if not by_rate:
                continue
            best = max(by_rate, key=lambda rate: statistics.mean(by_rate[rate].values()))
            finals = by_rate[best]
            cells = [task, name.format(best), mean(list(finals.values()))]
            for rate in (1e-4, 1e-3):
                auto = found.get((task, rate, "auto"), {})
                seeds = sorted(finals.keys() & auto.keys())
                cells.append(interval([auto[s]["final"] - finals[s] for s in seeds]) if seeds else "")
            rows.append([*cells, str(len(finals))])
    headings = ["task", "best plain run of its kind", "its accuracy"]
    return table([*headings, *(f"auto at {rate:g} - this, 95%" for rate in (1e-4, 1e-3)), "seeds"], rows)


def tables(rows: list[Row]) -> str:
    """All of them, each with its question."""
    found = by_arm(rows)
    parts = {
        "Every rate, next to plain RL at the same rate": every_rate(found),
        "A conservative rate: 250 steps against 400": conservative(found),
        "Tuned runs: best constant rate, schedule, mean at the end": tuned(found),
    }
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="write the tables from the committed results; run nothing")
    args = parser.parse_args()
    rows: list[Row] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    if not args.table:
        with ProcessPoolExecutor(max_workers=args.workers) as pool:
            for future in as_completed([pool.submit(run_one, *key) for key in missing(rows, args.seeds)]):
                rows.append(future.result())
                write(rows)
                print(len(rows), file=sys.stderr, flush=True)
    put("auto.md", "rates.py", tables(rows))


def write(rows: list[Row]) -> None:
    """The results' file, in a fixed order, a line for each row."""
    from next_core.process.hardware import hardware

    rows.sort(key=lambda r: (list(TASKS).index(r["task"]), r["setting"], r["learning_rate"], r["seed"], r["arm"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    FILE.write_text(f'{{"hardware": {json.dumps(hardware() + ", one thread a run")},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
