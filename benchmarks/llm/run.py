"""RL on a real language model: one GRPO run of SmolLM2-135M-Instruct, driven as `next-core run` drives it.

    python benchmarks/llm/run.py --task arithmetic --rate 1e-5 --arm auto --seed 0 --steps 100
    python benchmarks/llm/run.py --table    # only writes docs/benchmarks/llm.md's table anew

The same command resumes a run that was stopped. A finished run appends a line to benchmarks/results/llm.jsonl; --again
repeats it from the start. A run takes 6 GB of memory and, unless --threads says otherwise, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import prepare  # noqa: E402 - found by the line above, as is tables
import tables  # noqa: E402

RESULTS = tables.RESULTS / "llm.jsonl"
ARMS = ("plain", "auto", "next-mlp")
KEY = ("task", "learning_rate", "arm", "rank", "seed", "steps")
"""What identifies a run; of two lines with the same key the later one counts."""
RECENT = 10
"""Steps whose rewards are averaged. No train prompt comes twice, so this is sampled accuracy on new prompts."""
Row = dict[str, Any]


def arm_settings(arm: str, steps: int) -> Row:
    """Return what differs between arms. The config of ``auto`` is its name."""
    if arm == "auto":
        return {"predictor": "auto"}
    if arm == "plain":
        every = min(5, steps)
        return {"predictor": "stay", "schedule": {"observe": every, "every": every}, "guards": {"probe": False}}
    unit = max(1, steps // 25)  # examples/paper_one_jump.yaml, scaled; the paper guards against nothing
    schedule = {"observe": 15 * unit, "every": unit, "horizon": 5 * unit, "settle": 10 * unit, "alpha": 1.5}
    return {"predictor": arm, "schedule": schedule, "guards": {"probe": False, "max_norm_ratio": 100}}


def run_config(key: Row, model: Path, data: dict[str, Path]) -> Row:
    """Return a run's config as ``make_config`` reads it."""
    training = {
        "model": str(model),
        "data": {split: str(path) for split, path in data.items()},
        "learning_rate": key["learning_rate"],
        "lora": {"rank": key["rank"], "alpha": 2 * key["rank"]},
        "generations": 8,
        **prepare.TASKS[key["task"]],
    }
    return {
        "steps": key["steps"],
        "seed": key["seed"],
        "training": training,
        "backend": {
            "name": "trl",
            "args": {"logging_steps": 1, "save_total_limit": 2 if key["arm"] == "auto" else None},
        },
        "save_every": 10,
        "measure_every": 50,
        **arm_settings(key["arm"], key["steps"]),
    }


def run_one(key: Row, threads: int = 1, again: bool = False) -> Row:
    """Train, or resume training, and return the line of the results."""
    import logging
    import warnings

    import torch

    from next_core.config import make_config
    from next_core.cycle.run import run
    from next_core.sources.metrics import METRICS, by_step, read_log

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    config = make_config(run_config(key, prepare.model(), prepare.data(key["task"])))
    folder = prepare.cache() / "runs" / "-".join(f"{value}" for value in key.values())
    result = run(config, folder, overwrite=again, progress=_progress)
    logged = [of for _, of in sorted(by_step(read_log(folder / METRICS)).items()) if "reward" in of]
    return key | {
        "rewards": [round(of["reward"], 4) for of in logged],
        "seconds_a_step": round(statistics.median(of["step_time"] for of in logged), 1),  # those of a resumed run too
        "curve": result.curve,
        "jumps": sum(jump["accepted"] for jump in result.jumps),
        "average": None if result.average is None else result.average["reason"],
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
        "threads": threads,
        "hardware": result.hardware,
        "versions": result.versions,
    }


def _progress(what: str, done: int, total: int) -> None:
    print(what, f"{done}/{total}", file=sys.stderr, flush=True)


def read_rows() -> list[Row]:
    """Return the committed results, the last line of each run."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return list({tuple(row[name] for name in KEY): row for row in map(json.loads, lines)}.values())


def results_table(rows: list[Row]) -> str:
    """Return one line for each task, rate, arm, rank and number of steps: means over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["rank"], row["steps"], row["learning_rate"], row["arm"])):
        groups.setdefault(tuple(row[name] for name in KEY if name != "seed"), []).append(row)
    lines, parts = [], (slice(None, RECENT), slice(-RECENT, None))
    for (task, rate, arm, rank, steps), of in groups.items():
        first, last = ([statistics.mean(row["rewards"][part]) for row in of] for part in parts)
        seconds = [row["seconds_a_step"] for row in of]
        cells = [task, f"{rate:g}", arm, str(rank), str(steps), f"{tables.mean(first)} → {tables.mean(last)}"]
        cells += [_change(of, "sampled"), _change(of, "greedy")]
        lines.append([*cells, f"{statistics.mean(seconds):.0f}", str(len(of))])
    headings = "task|learning rate|arm|rank|steps|reward|sampled|greedy|s a step|seeds"
    machines = "; ".join(sorted({f"{row['hardware']}, threads: {row['threads']}" for row in rows}))
    return tables.table(headings.split("|"), lines) + (f"\n\n{machines}." if rows else "")


def _change(rows: list[Row], kind: str) -> str:
    """Test accuracy before and after training, the mean over seeds."""
    ends = [[row["curve"][at]["test"].get(kind) for row in rows] for at in (0, -1)]
    return "" if None in ends[0] else " → ".join(tables.mean(values) for values in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=prepare.TASKS, default="arithmetic")
    parser.add_argument("--rate", type=float, default=1e-5, help="learning rate (default: %(default)s)")
    parser.add_argument("--arm", choices=ARMS, default="plain")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; alpha is twice as much (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="delete this run's folder and start over")
    parser.add_argument("--table", action="store_true", help="write the table from the committed results; run nothing")
    args = parser.parse_args()
    if not args.table:
        key = dict(zip(KEY, (args.task, args.rate, args.arm, args.rank, args.seed, args.steps), strict=True))
        row = run_one(key, args.threads, args.again)
        if row not in read_rows():
            with RESULTS.open("a") as file:  # several runs may end at the same time: a line each, appended
                file.write(json.dumps(row) + "\n")
        print(results_table([row]))
        return
    tables.put("llm.md", "llm/run.py", results_table(read_rows()))


if __name__ == "__main__":
    main()
