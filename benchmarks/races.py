"""The comparison of all methods in docs/benchmarks/embedded-task.md, from the committed results of `next-core compare`.

next-core compare benchmarks/compare/NAME.yaml --out runs/NAME   # hours or minutes; goes on where it was stopped
python benchmarks/races.py --keep runs/NAME                      # takes its figures over into benchmarks/results
python benchmarks/races.py --table                               # only writes the tables anew
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tables import RESULTS, put, table

PREFIX = "compare-"
KINDS = ("sampled", "greedy")
TASKS = {"methods": "arithmetic", "sorting": "sorting", "editing": "editing"}
"""The comparisons of all methods, and their tasks."""
KEPT = ("hardware", "steps", "longer", "seeds", "metric", "base", "versions")
OF_ARM = (
    "role",
    "chosen",
    "steps",
    "spent_steps",
    "test",
    "difference",
    "difference_longer",
    "equals_step",
    "beyond",
    "icer",
    "seconds",
    "ours_seconds",
)
"""An arm's figures that are committed; the table has accuracies, and curves stay in the comparison's own folder."""


def keep(folder: Path) -> None:
    """The figures of one comparison, named after its folder."""
    found = json.loads((folder / "compare.json").read_text())
    arms = {
        name: {key: arm[key] for key in OF_ARM} | {"jumps": _jumps(arm), "variants": arm["variants"]}
        for name, arm in found["arms"].items()
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(arm)}" for name, arm in arms.items())
    facts = ",\n".join(f"{json.dumps(key)}: {json.dumps(found[key])}" for key in KEPT)
    (RESULTS / f"{PREFIX}{folder.name}.json").write_text(f'{{{facts},\n"arms": {{\n{lines}\n}}}}\n')


def _jumps(arm: dict[str, Any]) -> float:
    """Made in a run, the mean over seeds."""
    made = [sum(jump["accepted"] for jump in jumps) for jumps in arm["jumps"].values()]
    return sum(made) / len(made)


def all_tasks(found: dict[str, dict[str, Any]]) -> str:
    """Return one row for each arm, with one column for each task's comparison."""
    arms = next(iter(found.values()))["arms"]
    rows = [[name, *(_cell(comparison["arms"][name]) for comparison in found.values())] for name in arms]
    seeds = ", ".join(str(len(comparison["seeds"])) for comparison in found.values())
    machines = "; ".join(sorted({comparison["hardware"] for comparison in found.values()}))
    return f"{table(['arm', *found], rows)}\n\nSeeds: {seeds}. {machines}."


def _cell(arm: dict[str, Any]) -> str:
    return ", ".join(format(arm["test"][kind]["mean"], ".3f") for kind in KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a comparison's folder, whose figures are to be committed")
    parser.add_argument("--table", action="store_true", help="write the tables; the default as well")
    args = parser.parse_args()
    if args.keep is not None:
        keep(args.keep)
    found = {task: json.loads((RESULTS / f"{PREFIX}{name}.json").read_text()) for name, task in TASKS.items()}
    put("embedded-task.md", "races.py", all_tasks(found))


if __name__ == "__main__":
    main()
