"""``python -m benchmarks.speed``: run stages, keep their results as JSON, write the table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import benchmarks.speed
from benchmarks.speed import compress, dense, jump, predictor, scaling, table  # noqa: F401 - they register their stages
from benchmarks.speed.machine import hardware, measure_rates
from benchmarks.speed.stage import ORDER, STAGES, Options


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=benchmarks.speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=[*ORDER, "all", "table"], metavar="STAGE", help=", ".join(ORDER))
    parser.add_argument("--toy", action="store_true", help="tiny shapes, in this process; to see that all runs")
    parser.add_argument("--full", action="store_true", help="run the dense references whole, not on a sample (hours)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where runs are made (15 GB)")
    parser.add_argument("--mergekit", metavar="PYTHON", help="measure mergekit too, by the Python of its environment")
    parser.add_argument("--results", type=Path, help="folder for the JSON; default: benchmarks/results, none for --toy")
    args = parser.parse_args(arguments)
    results = args.results or (None if args.toy else table.RESULTS)
    torch.set_num_threads(1)
    for name in ORDER if "all" in args.stages else [name for name in args.stages if name != "table"]:
        run_stage(name, args, results)
    if results == table.RESULTS:
        print(table.write())


def run_stage(name: str, args: argparse.Namespace, results: Path | None) -> None:
    """One stage with the machine's rates just before it; its JSON under ``results``, or printed."""
    start = time.perf_counter()
    rates = measure_rates(64, 1) if args.toy else measure_rates()
    result = STAGES[name](Options(rates, args.toy, args.full, args.scratch, args.mergekit))
    facts = {
        "stage": name,
        "toy": args.toy,
        "hardware": hardware(),
        "rates": {"gemm_gflop_s": rates.gemm, "copy_gb_s": rates.copy},
        "setting": result.setting,
        "rows": result.rows,
    }
    if result.series is not None:
        facts["series"] = result.series
    text = json.dumps(facts, indent=1) + "\n"
    if results is None:
        print(text)
    else:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"speed-{name}.json").write_text(text)
    print(f"{name}: {time.perf_counter() - start:.0f} s, all preparation included", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Ended from outside, it still removes what it made: some 10 GB.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
