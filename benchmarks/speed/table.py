"""The tables of docs/benchmarks/speed.md, made from the committed results."""

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
    """All tables, under their headings."""
    parts = [
        "### Cost\n",
        _cost(results),
        "\n### Floors\n",
        _floors(results),
        "\n### Errors\n",
        _errors(results),
        "\n### Growth\n",
        _growth(results),
        "\n### Machine\n",
        _machines(results),
    ]
    return "\n".join(parts)


def _rows(results: list[Facts]) -> Iterable[tuple[str, dict[str, Any]]]:
    yield from ((facts["stage"], row) for facts in results for row in facts["rows"])


def _cost(results: list[Facts]) -> str:
    cells = []
    for stage, row in _rows(results):
        if "skipped" in row:
            cells.append([stage, row["what"], f"not run: {row['skipped']}", *["-"] * 6])
            continue
        reference = row.get("reference", {})
        times = _number(reference["cpu_s"] / row["cpu_s"]) if reference else "-"
        cells.append(
            [
                stage,
                row["what"],
                _number(row["cpu_s"]),
                _number(row.get("target_cpu_s")),
                _number(row["wall_s"]),
                _memory(row),
                _number(reference.get("cpu_s")),
                "; ".join(reference[key] for key in ("what", "how") if key in reference) or "-",
                times,
            ]
        )
    heads = ["stage", "what", "CPU-s", "target", "wall s", "own memory, GiB", "ref. CPU-s", "reference", "speed-up"]
    return _table(heads, cells)


def _memory(row: dict[str, Any]) -> str:
    if "own_gib" not in row:
        return "-"
    limit = f" (target {row['target_gib']:g})" if "target_gib" in row else ""
    return f"{row['own_gib']:.2f}{limit}"


def _floors(results: list[Facts]) -> str:
    cells = [
        [
            stage,
            row["what"],
            _number(row["floor"]["gflop"] or None),
            row["floor"]["dtype"] if row["floor"]["gflop"] else "-",
            _number(row["floor"]["gb"]),
            _number(row["floor"]["seconds"]),
            _number(row["cpu_s"]),
            f"{row['floor']['ratio']:.3g}",
        ]
        for stage, row in _rows(results)
        if "floor" in row
    ]
    return _table(["stage", "what", "GFLOP", "in", "GB moved", "floor, s", "CPU-s", "measured / floor"], cells)


def _errors(results: list[Facts]) -> str:
    cells = []
    for stage, row in _rows(results):
        ours = {"what": row["what"], "errors": row.get("errors", {})}
        for each in (ours, row.get("reference", {}), *row.get("others", [])):
            errors = each.get("errors", {})
            if "u" in errors:
                figures = [f"{errors[key]:.1e}" for key in ("sigma", "u", "v")]
                cells.append([stage, each["what"], *figures, _number(each.get("cpu_s", row["cpu_s"]))])
    return _table(["stage", "what", "sigma, relative", "sine of u's angle", "of v's", "CPU-s"], cells)


def _growth(results: list[Facts]) -> str:
    cells = []
    for facts in results:
        for series in facts.get("series", []):
            points = ", ".join(f"{p['x']}: {_number(p['cpu_s'])}" for p in series["points"])
            exponents = (f"{series[key]:.2f}" for key in ("exponent", "deltas"))
            cells.append([series["what"], points, *exponents])
    return _table(["varied", "value: CPU-s", "exponent of the cost", "of the number of deltas"], cells)


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
