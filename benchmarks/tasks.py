"""How plain RL climbs on each example task: real GRPO runs, without jumps.

    python benchmarks/tasks.py            # runs what benchmarks/results/tasks.json lacks, then the table
    python benchmarks/tasks.py --table    # only writes docs/benchmarks/tasks.md's table anew

Several seeds at the conservative learning rate of the examples' configs, and one at two larger rates. Accuracy is
exact (the probability of the right answer, by teacher forcing) on 1024 held-out prompts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tables

from next_core.process.hardware import hardware

EXAMPLES = tables.ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))  # for task_kit and the rewards; those of unseen tasks lie next to this file
RESULTS = tables.RESULTS / "tasks.json"

TASKS = {
    "arithmetic": {"reward": "math-verify", "max_new_tokens": 4},
    "sorting": {"reward": "sorting.reward:reward", "max_new_tokens": 7},
    "editing": {"reward": "editing.reward:reward", "max_new_tokens": 5},
}
UNSEEN = {
    "running-sums": {"reward": "unseen.running_sums:reward", "max_new_tokens": 13},
    "shifting": {"reward": "unseen.shifting:reward", "max_new_tokens": 6},
}
"""Tasks that no constant was chosen on; their files are made in the cache folder (benchmarks/unseen)."""
SEEDS = {1e-4: 3, 3e-4: 1, 1e-3: 1}
"""How many at each learning rate."""
STEPS = 400
MARKS = list(range(0, STEPS + 1, 50))
Row = dict[str, Any]


def training(task: str, learning_rate: float) -> Row:
    """Return the part of a config that trains on a task; make the files of an unseen one where they are missing."""
    folder = EXAMPLES / task if task in TASKS else made(task)
    return (TASKS | UNSEEN)[task] | {
        "model": str(folder / "base"),
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "learning_rate": learning_rate,
    }


def made(task: str) -> Path:
    """Return the folder of an unseen task's base and data, which take four minutes to make."""
    from task_kit import make

    from next_core.history.delta_cache import default_folder
    from next_core.storage.atomic import new_directory

    recipe = importlib.import_module(f"unseen.{task.replace('-', '_')}").TASK
    target = default_folder() / "tasks" / f"{task}-{zlib.crc32(repr(recipe.recipe).encode()):08x}"
    if not target.exists():
        with new_directory(target, overwrite=True) as folder:
            make(recipe, folder / "base", folder, seed=0)
    return target


def run_one(task: str, learning_rate: float, seed: int) -> Row:
    """One plain run, measured at the ``MARKS``."""
    from next_core.config import make_config
    from next_core.plugins import make_chosen

    config = make_config({"steps": STEPS, "seed": seed, "training": training(task, learning_rate), "predictor": "stay"})
    with tempfile.TemporaryDirectory() as folder:
        backend = make_chosen("backend", config.backend)
        backend.prepare(config, Path(folder))
        backend.start()
        curve, seconds = _watch(backend)
        backend.close()
    return {"task": task, "learning_rate": learning_rate, "seed": seed, "curve": curve, "seconds_a_step": seconds}


def _watch(backend: Any) -> tuple[list[float], dict[str, float]]:
    """Accuracy at the marks, and the seconds of a step: on the clock, and of CPU; measuring does not count."""
    clocks: dict[str, Callable[[], float]] = {"clock": time.perf_counter, "cpu": time.process_time}
    curve = [round(backend.evaluate("test"), 4)]
    spent = {name: -clock() for name, clock in clocks.items()}

    def step_ended(step: int) -> None:
        if step in MARKS:
            before = {name: clock() for name, clock in clocks.items()}
            curve.append(round(backend.evaluate("test"), 4))
            for name, clock in clocks.items():
                spent[name] -= clock() - before[name]

    backend.train(STEPS, step_ended)
    return curve, {name: round((spent[name] + clock()) / STEPS, 4) for name, clock in clocks.items()}


def base_accuracy(task: str) -> Row:
    """Parameters, architecture and exact accuracy of a base on the test prompts."""
    from task_kit import evaluate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = EXAMPLES / task / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (EXAMPLES / task / "test.jsonl").read_text().splitlines()]
    accuracy = evaluate(model, tokenizer, [row["prompt"] for row in rows], [row["answer"] for row in rows])
    return {
        "architecture": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sampled": round(accuracy.sampled, 4),
        "greedy": round(accuracy.greedy, 4),
    }


def missing(done: list[Row]) -> Iterator[tuple[str, float, int]]:
    """What is to be run yet, the first seed of everything before the second of anything."""
    have = {(row["task"], row["learning_rate"], row["seed"]) for row in done}
    for seed in range(max(SEEDS.values())):
        for task in TASKS:
            yield from ((task, rate, seed) for rate in SEEDS if seed < SEEDS[rate] and (task, rate, seed) not in have)


def run_missing() -> None:
    """Every run that the results lack, one after another; the results are written after each."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    machine = f"{hardware()}, one run at a time on one thread"
    bases = {task: base_accuracy(task) for task in TASKS}
    logging.disable(logging.WARNING)
    for task, rate, seed in list(missing(stored["rows"])):
        row = run_one(task, rate, seed)
        rows = sorted(
            [*stored["rows"], row], key=lambda r: (list(TASKS).index(r["task"]), r["learning_rate"], r["seed"])
        )
        stored = {"hardware": machine, "bases": bases, "rows": rows}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        print(task, rate, seed, row["curve"], row["seconds_a_step"], file=sys.stderr, flush=True)


def table(stored: Row) -> str:
    """Accuracy by step, mean over seeds, at every rate, and the seconds of a step."""
    shown = [mark for mark in MARKS if mark % 200 == 0 or mark == 250]
    lines = [f"| task | learning rate | seeds | {' | '.join(map(str, shown))} |", "|---" * (len(shown) + 3) + "|"]
    for task in TASKS:
        for rate in SEEDS:
            curves = [row["curve"] for row in stored["rows"] if (row["task"], row["learning_rate"]) == (task, rate)]
            if not curves:
                continue
            points = [point for mark, point in zip(MARKS, zip(*curves, strict=True), strict=True) if mark in shown]
            means = " | ".join(f"{statistics.mean(point):.3f}" for point in points)
            lines.append(f"| {task} | {rate:.0e} | {len(curves)} | {means} |".replace("e-0", "e-"))
    spent = {task: [row["seconds_a_step"]["cpu"] for row in stored["rows"] if row["task"] == task] for task in TASKS}
    seconds = ", ".join(f"{task} {statistics.mean(each):.2f}" for task, each in spent.items())
    return "\n".join([*lines, "", f"CPU-seconds a step: {seconds}. {stored['hardware']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the committed results; run nothing")
    if not parser.parse_args().table:
        run_missing()
    tables.put("tasks.md", "tasks.py", table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
