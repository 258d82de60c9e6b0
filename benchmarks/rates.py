"""`auto` (step scaling), `adaptive-secant` (jumps) and plain RL at every learning rate and task; nothing is tuned.

    python benchmarks/rates.py            # runs what benchmarks/results/rates.json lacks, then the tables
    python benchmarks/rates.py --table    # only rewrites the tables of docs/benchmarks/auto.md

250 RL steps each, with paired seeds. Accuracy is exact (the probability of the right answer, by teacher forcing) on
1024 held-out prompts. A plain run ends in the mean of its last checkpoints too, and is reported before and after it, so
that the mean's gain can be told from the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tables import RESULTS, put
from tasks import TASKS, UNSEEN, training

FILE = RESULTS / "rates.json"

STEPS = 250
MEASURE_EVERY = 50
RATES = (1e-3, 1e-4, 3e-4, 3e-5)
EXTREMES = (1e-2, 1e-1, 3e-6)
NO_PROBE = {"probe": False}
WATCHED = {"observe": 20, "every": 2, "horizon": 2, "average": 80}
"""The checkpoints and the mean of `adaptive-secant`."""
ARMS: dict[str, dict[str, Any]] = {
    "auto": {"predictor": "auto"},
    "adaptive-secant": {"predictor": "adaptive-secant"},
    "plain": {"predictor": "stay", "schedule": WATCHED, "guards": NO_PROBE},
    "linear": {"predictor": "stay", "guards": NO_PROBE},
    "per matrix": {"predictor": {"name": "adaptive-secant", "per_matrix": True}},
}
ARM_RATES = {
    "auto": (*RATES, *EXTREMES),
    "adaptive-secant": RATES,
    "plain": (*RATES, 2e-3, *EXTREMES),
    "linear": (1e-3, 2e-3),
    "per matrix": (1e-3, 1e-4),
}
UNSEEN_RATES = {"auto": (1e-4, 1e-3, 1e-1, 3e-6), "plain": (3e-4, 1e-3, 2e-3, 4e-3), "linear": (1e-3, 2e-3, 4e-3)}
UNSEEN_SEEDS = 2
ARM_SEEDS = {"per matrix": 2}
"""Where fewer than the others'."""
SETTINGS: dict[str, dict[str, Any]] = {
    "4 prompts a step": {"training": {"prompts_per_step": 4}},
    "LoRA rank 2": {"training": {"lora": {"rank": 2, "alpha": 4}}},
    "LoRA rank 32": {"training": {"lora": {"rank": 32, "alpha": 64}}},
    "LoRA rank 64": {"training": {"lora": {"rank": 64, "alpha": 128}}},
    "beta 0.04": {"training": {"beta": 0.04}},
    "full parameters": {"training": {"lora": None}},
    "RLOO": {"training": {"algorithm": "rloo"}},
    "REINFORCE++": {"training": {"algorithm": "reinforce++"}},
    "num_iterations 2": {"backend": {"name": "trl", "args": {"num_iterations": 2}}},
    "1,000 steps": {"steps": 1000},
}
"""Other settings of the arithmetic task, each at two rates."""
TRL = {
    "loss_type dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "loss_type cispo": {"loss_type": "cispo"},
    "loss_type sapo": {"loss_type": "sapo"},
    "importance sampling by sequence": {"importance_sampling_level": "sequence"},
    "steps_per_generation 4": {"steps_per_generation": 4},
    "weight_decay 0.1": {"weight_decay": 0.1},
    "max_grad_norm 0.01": {"max_grad_norm": 0.01},
    "adam_beta1 0": {"adam_beta1": 0.0},
    "adam_beta2 0.95": {"adam_beta2": 0.95},
    "Adafactor": {"optim": "adafactor"},
    "SGD": {"optim": "sgd"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"backend": {"name": "trl", "args": args}} for name, args in TRL.items()},
    "LoRA alpha 1": {"training": {"lora": {"rank": 8, "alpha": 1}}},
    "LoRA alpha 256": {"training": {"lora": {"rank": 8, "alpha": 256}}},
    "2 generations": {"training": {"generations": 2}},
    "4 prompts of 32 generations": {"training": {"generations": 32, "prompts_per_step": 4}},
}
"""What else may be set, for `auto` on arithmetic from 1e-4."""
SETTING_RATES = (1e-4, 1e-3)
SETTING_SEEDS = 2
Key = tuple[str, float, int, str, str]
Row = dict[str, Any]
By = dict[tuple[str, float, str], dict[int, Row]]


def run_one(task: str, rate: float, seed: int, arm: str, setting: str = "") -> Row:
    """Train once and return the row. The config of `auto` has only the task, the rate and the seed."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from next_core.config import make_config
    from next_core.cycle.run import run

    changes = (SETTINGS | OPTIONS).get(setting, {})
    settings = training(task, rate) | {"lr_scheduler": "linear" if arm == "linear" else "constant"}
    config = make_config(
        {"steps": STEPS, "seed": seed, "measure_every": MEASURE_EVERY}
        | ARMS[arm]
        | changes
        | {"training": settings | changes.get("training", {})}
    )
    with tempfile.TemporaryDirectory() as out:
        result = run(config, Path(out) / "run")
        more = scaled(result.scaling) if arm == "auto" else advised(result, Path(out) / "run" / "checkpoints")
    return measured(result, task, rate, seed, arm, setting) | more


def measured(result: Any, task: str, rate: float, seed: int, arm: str, setting: str) -> Row:
    """Return the part of a row that all arms have."""
    return {
        "task": task,
        "learning_rate": rate,
        "seed": seed,
        "arm": arm,
        "setting": setting,
        "start": _rounded(result.accuracy["start"], 4),
        "before_average": _rounded(result.accuracy.get("before_average"), 4),
        "final": _rounded(result.accuracy["final"], 4),
        "average": None if result.average is None else result.average["reason"],
        "curve": [
            {"step": point["step"], **{kind: round(value, 4) for kind, value in point["test"].items()}}
            for point in result.curve
        ],
        "seconds": {key: round(value, 2) for key, value in result.seconds.items()},
    }


def scaled(records: list[Row]) -> Row:
    """Return the rates that step scaling found: the first, and the extremes from then on. None if it found none."""
    from next_predictors.step_scale import PHASES

    begins = max((index for index, record in enumerate(records) if record.get("back_to") == 0), default=-1)
    used = [record for record in records[begins + 1 :] if "rate" in record]
    phases = [record.get("diagnostics", {}).get("phase") for record in used]
    first = phases.index(PHASES.index("found")) if PHASES.index("found") in phases else None
    rates = [] if first is None else [float(f"{record['rate']:.4g}") for record in used[first:]]
    return {
        "found": None if first is None else {"step": used[first]["step"], "rate": rates[0], "last": rates[-1]},
        "lowest": min(rates, default=None),
        "highest": max(rates, default=None),
        "restarts": sum(record["event"] == "scale" and "back_to" in record for record in records),
        "collapses": sum(record["event"] == "collapse" for record in records),
    }


def advised(result: Any, checkpoints: Path) -> Row:
    """Return the jumps, and the learning-rate advice of the checkpoints."""
    from next_core.checkpoints import open_checkpoints
    from next_core.diagnostics import learning_rate_factor, with_origin
    from next_core.history.history import History

    advice = learning_rate_factor(History(with_origin(open_checkpoints(checkpoints))), result.jumps)
    jumps = [jump for jump in result.jumps if jump["accepted"]]
    return {
        "jumps": len(jumps),
        "multiples": {jump["step"]: round(jump["diagnostics"]["multiple"], 2) for jump in jumps},
        "agreement": _rounded(advice.agreement),
        "factor": _rounded(advice.factor),
        "multiple": _rounded(advice.multiple),
    }


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def missing(rows: list[Row], seeds: int) -> list[Key]:
    """The first seed of everything before the second of anything."""
    have = {(row["task"], row["learning_rate"], row["seed"], row["arm"], row["setting"]) for row in rows}
    wanted = [(t, rate, s, arm, "") for s in range(seeds) for t in TASKS for arm in ARMS for rate in ARM_RATES[arm]]
    wanted = [key for key in wanted if key[2] < ARM_SEEDS.get(key[3], seeds)]
    wanted += [
        (task, rate, seed, arm, "")
        for seed in range(min(seeds, UNSEEN_SEEDS))
        for task in UNSEEN
        for arm, rates in UNSEEN_RATES.items()
        for rate in rates
    ]
    wanted.sort(key=lambda key: key[2])
    wanted += [
        ("arithmetic", rate, seed, arm, setting)
        for seed in range(min(seeds, SETTING_SEEDS))
        for setting in SETTINGS
        for rate in SETTING_RATES
        for arm in ("auto", "adaptive-secant", "plain")
    ]
    wanted += [("arithmetic", 1e-4, 0, "auto", option) for option in OPTIONS]
    return [key for key in wanted if key not in have]


def by_arm(rows: list[Row]) -> By:
    """Rows without other settings, by task, rate and arm, and in each by seed."""
    found: By = {}
    for row in (row for row in rows if not row["setting"]):
        found.setdefault((row["task"], row["learning_rate"], row["arm"]), {})[row["seed"]] = row
    return found


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
    from rate_tables import tables

    put("auto.md", "rates.py", tables(rows))


def write(rows: list[Row]) -> None:
    """The results' file, in a fixed order, a line for each row."""
    from next_core.process.hardware import hardware

    rows.sort(key=lambda r: ([*TASKS, *UNSEEN].index(r["task"]), r["setting"], r["learning_rate"], r["seed"], r["arm"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    FILE.write_text(f'{{"hardware": {json.dumps(hardware() + ", one thread a run")},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
