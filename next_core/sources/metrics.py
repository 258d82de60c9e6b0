"""What a trainer logged, by step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError
from next_core.sources.checkpoint_names import MOST_STEPS
from next_core.sources.layouts import RUN_FOLDER
from next_core.sources.tensor_files import read_json
from next_core.storage.json_lines import parse_json_line
from next_core.storage.reading import LARGE, read_bytes

METRICS = "metrics.jsonl"


def read_metrics(folders: Mapping[int, Path]) -> dict[int, dict[str, float]]:
    """Logged metrics by step: from the newest ``trainer_state.json``, or from ``metrics.jsonl`` of a run folder."""
    logged: list[dict[str, Any]] = []
    if folders:
        newest = folders[max(folders)]
        if os.path.lexists(newest / "trainer_state.json"):
            logged = read_json(newest / "trainer_state.json", LARGE, verify=True).get("log_history", [])
            if not isinstance(logged, list):
                raise CheckpointError(f"{newest / 'trainer_state.json'}: log_history is no list; restore the file")
        else:
            logged = read_log(newest.parent.parent / METRICS)
    return by_step(logged)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; none where there is no such file. A torn last line is dropped.

    Beside a journal the file is ours, and any other damage a ``CheckpointError`` that names the line; elsewhere lines
    that are not ours are left out.
    """
    if not os.path.lexists(path):
        return []
    ours = (path.parent / RUN_FOLDER[0]).exists()
    records = []
    try:
        for number, line in enumerate(read_bytes(path, LARGE).splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):  # else torn: the run was killed while it wrote
                try:
                    records.append(parse_json_line(line))
                except ValueError as error:
                    if ours:
                        raise ValueError(f"line {number}: {error}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or remove it: predictors go on") from None
    return records


def by_step(logged: Sequence[Any]) -> dict[int, dict[str, float]]:
    """Finite numbers that were logged, by step."""
    metrics: dict[int, dict[str, float]] = {}
    for record in logged:
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] <= MOST_STEPS:
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
            metrics.setdefault(record["step"], {}).update(finite)
    return metrics
