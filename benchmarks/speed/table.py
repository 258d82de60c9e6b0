"""The figures of docs/benchmarks/speed.md, made from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.speed.stage import ORDER

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks" / "speed.md"
BEGIN, END = "<!-- tables: made by python -m benchmarks.speed table -->", "<!-- end of tables -->"
Facts = dict[str, Any]


def write() -> str:
    """Put the tables into the page; returns them."""
    text = render(load(RESULTS))
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    return text


def shown() -> str:
    """The tables as they stand in the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def load(results: Path) -> list[Facts]:
    """The results of every stage that has any, in the order of the stages."""
    paths = [results / f"speed-{name}.json" for name in ORDER]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def render(results: list[Facts]) -> str:
    """The table and what belongs to it."""
    return "\n\n".join([_cost(results), *_notes(results), _growth(results), _machines(results)])


def _rows(results: list[Facts]) -> Iterable[tuple[str, dict[str, Any]]]:
    yield from ((facts["stage"], row) for facts in results for row in facts["rows"])


def _cost(results: list[Facts]) -> str:
    cells = []
    for stage, row in _rows(results):
        if "skipped" in row:
            cells.append([stage, row["what"], f"not run: {row['skipped']}", *["-"] * 5])
            continue
        reference, floor = row.get("reference", {}), row.get("floor", {})
        times = _number(reference["cpu_s"] / row["cpu_s"]) if reference else "-"
        over = f"{floor['ratio']:.3g}" if floor else "-"
        cost = [_number(row["cpu_s"]), _number(row.get("target_cpu_s")), over, _memory(row)]
        cells.append([stage, row["what"], *cost, times, _error(row)])
    return _table(
        ["stage", "what", "CPU-s", "target", "CPU-s / floor", "own memory, GiB", "speed-up", "error (reference's)"],
        cells,
    )


def _error(row: dict[str, Any]) -> str:
    """The sine of the angle of u, the reference's in brackets."""
    found = [each.get("errors", {}).get("u") for each in (row, row.get("reference", {}))]
    if found[0] is None:
        return "-"
    return f"{found[0]:.0e}" + ("" if found[1] is None else f" ({found[1]:.0e})")


def _memory(row: dict[str, Any]) -> str:
    if "own_gib" not in row:
        return "-"
    limit = f" (target {row['target_gib']:g})" if "target_gib" in row else ""
    return f"{row['own_gib']:.2f}{limit}"


def _notes(results: list[Facts]) -> Iterable[str]:
    """What other libraries do on the rows above: their errors, or what they cost; and what cold files cost."""
    errors: dict[str, list[str]] = {}
    costs, cold = [], []
    for stage, row in _rows(results):
        for other in row.get("others", []):
            if "errors" in other:
                errors.setdefault(other["what"].partition("(")[0], []).append(f"{other['errors']['u']:.0e}")
            else:
                seconds = f"{_number(other['cpu_s'])} CPU-s ({_number(other['ours_cpu_s'])} here)"
                costs.append(f"{other['what']}: {seconds}, {other['own_gib']:.1f} GiB")
        if "cold" in row:
            times = [_number(row["cold"][key]) for key in ("cpu_s", "warm_cpu_s", "wall_s")]
            cold.append("{} {} CPU-s (warm {}), {} s".format(stage, *times))
    found = [f"`{name}` {', '.join(values)}" for name, values in errors.items()]
    yield f"Errors of other libraries on the rows of dense-top1: {'; '.join(found) or 'not run'}."
    yield f"The same jump, run in turn: {'; '.join(costs) or 'not run'}."
    yield f"Files not in the page cache: {'; '.join(cold) or 'not run'}."


def _growth(results: list[Facts]) -> str:
    """The exponent of the cost in what is varied."""
    every = [series for facts in results for series in facts.get("series", [])]
    found = [f"{one['what']} {one['exponent']:.2f}" for one in every]
    return f"Cost grows with these exponents: {', '.join(found)}."


def _machines(results: list[Facts]) -> str:
    """One line for each machine that took part; the rates' range over the stages."""
    lines = []
    for machine in dict.fromkeys(json.dumps(facts["hardware"], sort_keys=True) for facts in results):
        known = json.loads(machine)
        mine = [facts["rates"] for facts in results if facts["hardware"] == known]
        gemm = "; ".join(
            f"{dtype} {_range([rates['gemm_gflop_s'][dtype] for rates in mine])}" for dtype in mine[0]["gemm_gflop_s"]
        )
        lines.append(
            f"{known['cpu']}, {known['cores']} cores, {known['ram_gib']:.0f} GiB; torch {known['torch']}, "
            f"{known['blas']}, {known['threads']} thread. One thread reached, before each stage: GEMM, GFLOP/s: "
            f"{gemm}; copy, GB/s read plus written: {_range([rates['copy_gb_s'] for rates in mine])}."
        )
    return "\n\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _table(heads: list[str], cells: list[list[str]]) -> str:
    rule = f"|{'---|' * len(heads)}"
    first, *rest = (f"| {' | '.join(line)} |" for line in (heads, *cells))
    return "\n".join([first, rule, *rest])
