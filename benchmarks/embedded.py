"""What each predictor does for the arithmetic task: real GRPO runs, several seeds, beside their controls.

    python benchmarks/embedded.py            # runs what benchmarks/results/embedded.json lacks, then the table
    python benchmarks/embedded.py --table    # only writes docs/benchmarks/embedded-task.md's table anew

One jump at step 150 (the paper's schedule, scaled to 250 steps), many small jumps, plain runs of 250 and 400 steps, and
plain runs at other learning rates. A jump costs no RL step, so that all arms but `plain 400` spend 250 steps of
roll-outs. Accuracy is exact (the probability of the right answer, by teacher forcing) on 1024 held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tables

from next_core.process.hardware import hardware

RESULTS = tables.RESULTS / "embedded.json"

ONE = {"observe": 150, "every": 10, "horizon": 50, "settle": 100}
MANY = {"observe": 50, "every": 5, "horizon": 10, "jump_every": 10, "settle": 10}
GATED = {"name": "secant", "window": 10, "gate": {}}


def one(alpha: float, **predictor: Any) -> dict[str, Any]:
    return {"predictor": predictor, "schedule": ONE | {"alpha": alpha}}


def many(alpha: float, **predictor: Any) -> dict[str, Any]:
    return {"predictor": predictor, "schedule": MANY | {"alpha": alpha}}


ARMS: dict[str, dict[str, Any]] = {
    "plain 250 (no jump)": one(1.0, name="stay"),
    "plain 400": one(1.0, name="stay") | {"steps": 400},
    "one jump, next-mlp, alpha 1.5": one(1.5, name="next-mlp"),
    "one jump, next-mlp, signs unaligned (as released), alpha 1.5": one(1.5, name="next-mlp", align=False),
    "one jump, alpharl (step), alpha 1": one(1.0, name="alpharl"),
    "one jump, alpharl (reward), alpha 1": one(1.0, name="alpharl", metric="reward"),
    "one jump, relex from the base, alpha 1": one(1.0, name="relex"),
    "one jump, relex pinned, alpha 1": one(1.0, name="relex", anchor="newest"),
    "one jump, rl-extra, alpha 1": one(1.0, name="rl-extra"),
    "one jump, ridge, alpha 1": one(1.0, name="ridge"),
    "one jump, ridge, alpha 3": one(3.0, name="ridge"),
    "one jump, secant merged, window 50, alpha 1": one(1.0, name="secant", window=50, space="merged"),
    "one jump, secant merged, window 50, alpha 4": one(4.0, name="secant", window=50, space="merged"),
    "one jump, secant factors, window 50, alpha 4": one(4.0, name="secant", window=50),
    "many jumps, secant merged, window 10, alpha 2": many(2.0, name="secant", window=10, space="merged"),
    "many jumps, secant factors, window 10, alpha 2": many(2.0, name="secant", window=10),
    "many jumps, secant factors, gated, alpha 2": many(2.0, **GATED),
    "many jumps, secant factors, gated, alpha 4": many(4.0, **GATED),
    "plain 250, lr 3e-4": one(1.0, name="stay") | {"learning_rate": 3e-4},
    "plain 250, lr 5e-4": one(1.0, name="stay") | {"learning_rate": 5e-4},
    "plain 250, lr 1e-3": one(1.0, name="stay") | {"learning_rate": 1e-3},
    "plain 250, lr 1e-3, linear decay": one(1.0, name="stay") | {"learning_rate": 1e-3, "lr_scheduler": "linear"},
    "many jumps, gated, alpha 4, lr 3e-4": many(4.0, **GATED) | {"learning_rate": 3e-4},
    "many jumps, gated, alpha 2, lr 1e-3": many(2.0, **GATED) | {"learning_rate": 1e-3},
}


def run_one(arm: str, seed: int) -> dict[str, Any]:
    """One training run. Returns what the table needs."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from next_core.config import make_config
    from next_core.cycle.run import run

    spec = ARMS[arm]
    examples = tables.ROOT / "examples" / "arithmetic"
    training = {
        "model": str(examples / "base"),
        "data": {split: str(examples / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "learning_rate": spec.get("learning_rate", 1e-4),
        "lr_scheduler": spec.get("lr_scheduler", "constant"),
        "max_new_tokens": 4,
    }
    config = make_config(
        {
            "steps": spec.get("steps", 250),
            "seed": seed,
            "training": training,
            "predictor": spec["predictor"],
            "schedule": spec["schedule"],
            # No guard may hide what a predictor does, but a jump of 100 times the recent motion is no extrapolation.
            "guards": {"probe": False, "max_norm_ratio": 100},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder) / "run")
    jumps = [j for j in result.jumps if j["accepted"]]
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": result.accuracy,
        "jumps": len(jumps),
        "norm_ratio": [j["norm_ratio"] for j in jumps],
        "refused": sorted({j["reason"] for j in result.jumps if not j["accepted"]})[:3],
        "seconds": {key: round(value, 2) for key, value in result.seconds.items()},
    }


def missing(done: list[dict[str, Any]], seeds: int) -> Iterator[tuple[str, int]]:
    have = {(row["arm"], row["seed"]) for row in done}
    yield from ((arm, seed) for arm in ARMS for seed in range(seeds) if (arm, seed) not in have)


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = [
        "| run | before and right after the first jump | end | jumps made |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        before, after = (mean([row["accuracy"][k] for row in mine]) for k in ("before_jump", "after_jump"))
        ends = [row["accuracy"]["final"] for row in mine]
        end = f"{statistics.mean(ends):.3f}" + (f" ± {statistics.stdev(ends):.3f}" if len(ends) > 1 else "")
        jumps = sorted({row["jumps"] for row in mine})
        made = str(jumps[0]) if len(jumps) == 1 else f"{jumps[0]}-{jumps[-1]}"
        lines.append(f"| {arm} | {before}{'' if before == '-' else f' → {after}'} | {end} | {made} |")
    seeds = len({row["seed"] for row in rows})
    lines += ["", f"{seeds} seeds, ± one standard deviation. {json.loads(RESULTS.read_text())['hardware']}."]
    return "\n".join(lines)


def mean(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.mean(found):.3f}" if found else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="only arms whose name contains this")
    parser.add_argument("--table", action="store_true", help="write the table from the committed results; run nothing")
    args = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows: list[dict[str, Any]] = stored["rows"]
    if not args.table:
        todo = [(arm, seed) for arm, seed in missing(rows, args.seeds) if args.only in arm]
        with ProcessPoolExecutor(max_workers=args.workers) as pool:
            for future in as_completed([pool.submit(run_one, arm, seed) for arm, seed in todo]):
                row = future.result()
                rows.append(row)
                rows.sort(key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))
                machine = f"{hardware()}, one thread a run"
                RESULTS.write_text(json.dumps({"hardware": machine, "rows": rows}, indent=1) + "\n")
                print(row["arm"], row["seed"], row["accuracy"]["final"], file=sys.stderr, flush=True)
    tables.put("embedded-task.md", "embedded.py", table(rows))


if __name__ == "__main__":
    main()
