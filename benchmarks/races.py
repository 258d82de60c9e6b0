"""The comparisons in docs/benchmarks/embedded-task.md, from the committed results of `next-core compare`.

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
"""What a table needs; curves and jumps stay in the comparison's own folder."""


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


def of_comparison(found: dict[str, Any]) -> str:
    """Return one row for each arm."""
    seeds, rows = len(found["seeds"]), []
    for name, arm in found["arms"].items():
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in arm["chosen"].items())
        cells = [name + (f" ({chosen})" if chosen else ""), *(_of(arm["test"][kind], ".3f") for kind in KINDS)]
        cells += [_of(arm["difference"], "+.3f")] if seeds > 1 else []
        cells += [("≥ " if arm["beyond"] else "") + f"{arm['equals_step']['mean']:.0f}", f"{arm['jumps']:.0f}"]
        rows.append(cells)
    paired = ["- plain, 95%"] if seeds > 1 else []
    text = table(["arm", *KINDS, *paired, "equals plain step", "jumps"], rows)
    return f"{text}\n\n{seeds} seed{'s' * (seeds > 1)}. {found['hardware']}."


def _of(figure: dict[str, Any] | None, form: str) -> str:
    if figure is None:
        return ""
    mean = format(figure["mean"], form)
    return mean if figure["low"] is None else f"{mean} ({figure['low']:{form}} to {figure['high']:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a comparison's folder, whose figures are to be committed")
    parser.add_argument("--table", action="store_true", help="write the tables; the default as well")
    args = parser.parse_args()
    if args.keep is not None:
        keep(args.keep)
    parts = []
    for file in sorted(RESULTS.glob(f"{PREFIX}*.json")):
        name = file.stem.removeprefix(PREFIX)
        parts.append(f"**{name}** (`benchmarks/compare/{name}.yaml`)\n\n{of_comparison(json.loads(file.read_text()))}")
    put("embedded-task.md", "races.py", "\n\n".join(parts))


if __name__ == "__main__":
    main()
