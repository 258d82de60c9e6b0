"""What watching and jumping cost beside RL steps of the arithmetic task, which are as cheap as RL steps get.

    python benchmarks/callback_overhead.py      # writes benchmarks/results/callback_overhead.json, prints the table

Every figure is a ratio of two clocks of one run: seconds inside next-core over seconds of RL, probes excluded (a probe
is an evaluation, and its price is the evaluation's). The floor: copying the trained tensors once per checkpoint.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from next_core.process.hardware import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "callback_overhead.json"
MANY = {"observe": 50, "every": 5, "horizon": 10, "jump_every": 10, "settle": 10, "alpha": 4}
GATED = {"name": "secant", "window": 10, "gate": {}}
CASES: dict[str, dict[str, Any]] = {
    "watching: a checkpoint every 5 steps": {"predictor": "stay", "schedule": {"observe": 100, "every": 5}},
    "100 steps, gated secant in factor space, 5 jumps": {"predictor": GATED, "schedule": MANY},
    "100 steps, one rl-extra jump, a frozen adapter from then on": {
        "predictor": "rl-extra",
        "schedule": {"observe": 50, "every": 5, "horizon": 10},
    },
    "100 steps, scaled by `auto`": {"predictor": "auto", "schedule": {}, "guards": {"probe": False}},
}


def measure(case: dict[str, Any], out: Path) -> dict[str, float]:
    from next_core.config import load_config, make_config
    from next_core.cycle.run import run
    from next_core.diagnostics.learning_rate import run_advice

    quickstart = load_config(ROOT / "examples" / "quickstart.yaml").model_dump(mode="json")
    guards = {"probe": False, "max_norm_ratio": None}
    config = make_config(quickstart | {"control": "none", "guards": guards} | case)
    seconds = run(config, out, advise=run_advice).seconds
    ours = {key: seconds[key] for key in ("ours_observe", "ours_predict", "ours_extend")}
    return {"rl": seconds["rl"], "ours": sum(ours.values()), **ours}


def copy_floor() -> float:
    """Seconds to copy the task's 28 LoRA tensors once."""
    tensors = [torch.zeros(8, 128) for _ in range(28)]
    start = time.perf_counter()
    for _ in range(200):
        _ = [tensor.clone() for tensor in tensors]
    return (time.perf_counter() - start) / 200


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        measure(CASES["watching: a checkpoint every 5 steps"], Path(folder) / "warm-up")
        for name, case in CASES.items():
            runs = [measure(case, Path(folder) / f"{len(rows)}-{again}") for again in range(3)]
            runs.sort(key=lambda r: r["ours"] / r["rl"])
            middle = runs[1]
            rows.append(
                {
                    "case": name,
                    "share_of_rl": round(middle["ours"] / middle["rl"], 5),
                    "spread": [round(r["ours"] / r["rl"], 5) for r in runs],
                    "ms_per_step": round(10 * middle["ours"], 3),
                    "rl_ms_per_step": round(10 * middle["rl"], 1),
                    "seconds": {key: round(value, 4) for key, value in middle.items()},
                }
            )
            print(json.dumps(rows[-1]))
    machine = f"{hardware()}, one thread"
    facts = {"hardware": machine, "copy_floor_ms": round(1e3 * copy_floor(), 3), "rows": rows}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print("| case | share of RL time | ms a step | RL, ms a step |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {100 * row['share_of_rl']:.2f}% | {row['ms_per_step']} | {row['rl_ms_per_step']} |")


if __name__ == "__main__":
    main()
