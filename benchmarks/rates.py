"""`auto` beside plain RL at every learning rate and task: one policy, nothing tuned.

    python benchmarks/rates.py            # runs what benchmarks/results/rates.json lacks, then the table
    python benchmarks/rates.py --table    # only writes docs/auto.md's table anew

250 RL steps each, the seeds paired. Accuracy is exact (the probability of the right answer, by teacher forcing) on 1024
held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from scipy.stats import t as student
from tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "benchmarks" / "results" / "rates.json"
PAGE = ROOT / "docs" / "auto.md"
BEGIN, END = "<!-- table: made by benchmarks/rates.py -->", "<!-- end of table -->"

RATES = (1e-4, 1e-3, 3e-4, 3e-5)
ARMS = ("auto", "stay")
STEPS = 250
Key = tuple[str, float, int, str]


def run_one(task: str, rate: float, seed: int, arm: str) -> dict[str, Any]:
    """One training run. The config says no more than the task and the rate."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))  # where the rewards lie
    from next_core.config import make_config
    from next_core.cycle.run import run
    from next_core.diagnostics import learning_rate_factor
    from next_core.history import History
    from next_core.sources.opening import open_checkpoints

    folder = EXAMPLES / task
    training = TASKS[task] | {
        "model": str(folder / "base"),
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "learning_rate": rate,
    }
    config = make_config(
        {"steps": STEPS, "seed": seed, "training": training, "predictor": arm, "guards": {"probe": False}}
    )
    with tempfile.TemporaryDirectory() as out:
        result = run(config, Path(out) / "run")
        advised = learning_rate_factor(History(open_checkpoints(Path(out) / "run" / "checkpoints")), result.jumps)
    jumps = [jump for jump in result.jumps if jump["accepted"]]
    return {
        "task": task,
        "learning_rate": rate,
        "seed": seed,
        "arm": arm,
        "start": round(result.accuracy["start"] or 0.0, 4),
        "final": round(result.accuracy["final"] or 0.0, 4),
        "jumps": len(jumps),
        "multiples": {jump["step"]: round(jump["diagnostics"]["multiple"], 2) for jump in jumps if arm == "auto"},
        "agreement": _rounded(advised.agreement),
        "factor": _rounded(advised.factor),
        "multiple": _rounded(advised.multiple),
        "seconds": {key: round(value, 2) for key, value in result.seconds.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def missing(rows: list[dict[str, Any]], seeds: int) -> list[Key]:
    """The first seed of everything before the second of anything."""
    have = {(row["task"], row["learning_rate"], row["seed"], row["arm"]) for row in rows}
    wanted = [(t, rate, seed, arm) for seed in range(seeds) for t in TASKS for rate in RATES for arm in ARMS]
    return [key for key in wanted if key not in have]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds that both arms have, and the 95% interval of their paired difference.

    Beside them what the plain run's checkpoints advise (the median over its seeds; rows of before that was recorded
    have none), and what would have been right: the best of ``RATES`` for a plain run over this one.
    """
    found = {(row["task"], row["learning_rate"], row["arm"], row["seed"]): row for row in rows}
    lines = [
        "| task | learning rate | plain | auto | auto - plain, 95% | jumps | largest multiple | advised factor "
        "| best rate / this | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        best = best_rate(rows, task)
        for rate in sorted(RATES):
            both = ({s for t, r, a, s in found if (t, r, a) == (task, rate, arm)} for arm in ("stay", "auto"))
            seeds = sorted(set.intersection(*both))
            pairs = [(found[task, rate, "stay", seed], found[task, rate, "auto", seed]) for seed in seeds]
            if not pairs:
                continue
            plain, auto = ([pair[arm]["final"] for pair in pairs] for arm in (0, 1))
            difference = [ours - theirs for theirs, ours in zip(plain, auto, strict=True)]
            jumps = statistics.mean(pair[1]["jumps"] for pair in pairs)
            most = max(max(pair[1]["multiples"].values(), default=1.0) for pair in pairs)
            advised = [pair[0]["factor"] for pair in pairs if pair[0].get("factor") is not None]
            advice = f"{statistics.median(advised):.2g}" if advised else ""
            cells = (f"{statistics.mean(plain):.3f}", f"{statistics.mean(auto):.3f}", interval(difference))
            more = (f"{jumps:.0f}", f"{most:.1f}", advice, f"{best / rate:.2g}", str(len(pairs)))
            lines.append(f"| {task} | {rate:g} | {' | '.join((*cells, *more))} |")
    return "\n".join(lines)


def best_rate(rows: list[dict[str, Any]], task: str) -> float:
    """The constant rate whose plain runs end best, the mean over their seeds."""
    plain: dict[float, list[float]] = {}
    for row in rows:
        if (row["task"], row["arm"]) == (task, "stay"):
            plain.setdefault(row["learning_rate"], []).append(row["final"])
    return max(plain, key=lambda rate: statistics.mean(plain[rate]), default=0.0)


def interval(values: list[float]) -> str:
    """Mean and Student's 95% interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="write the table from the committed results; run nothing")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    if not args.table:
        with ProcessPoolExecutor(max_workers=args.workers) as pool:
            for future in as_completed([pool.submit(run_one, *key) for key in missing(rows, args.seeds)]):
                rows.append(future.result())
                rows.sort(key=lambda r: (list(TASKS).index(r["task"]), r["learning_rate"], r["seed"], r["arm"]))
                hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread a run"
                RESULTS.write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=1) + "\n")
                print(len(rows), file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if PAGE.exists():
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
