"""What a trainer logged, by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError
from next_core.sources.files import read_json

METRICS = "metrics.jsonl"


def read_metrics(folders: Mapping[int, Path]) -> dict[int, dict[str, float]]:
    """Logged metrics by step: from the newest ``trainer_state.json``, or from ``metrics.jsonl`` of a run folder."""
    logged: list[dict[str, Any]] = []
    if folders:
        newest = folders[max(folders)]
        if (newest / "trainer_state.json").exists():
            logged = read_json(newest / "trainer_state.json").get("log_history", [])
            if not isinstance(logged, list):
                raise CheckpointError(f"{newest / 'trainer_state.json'}: log_history is no list; restore the file")
        elif (newest.parent.parent / METRICS).exists():
            lines = (newest.parent.parent / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines:
                try:
                    logged.append(json.loads(line))
                except (ValueError, RecursionError):
                    continue  # torn: the run was killed while it wrote
    metrics: dict[int, dict[str, float]] = {}
    for record in logged:
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            metrics.setdefault(record["step"], {}).update(numbers)
    return metrics


def metrics_at(metrics: Mapping[int, Mapping[str, float]], step: int, since: int | None = None) -> Mapping[str, float]:
    """The last metrics logged at or before a step, and after ``since``."""
    past = [logged for logged in metrics if logged <= step and (since is None or logged > since)]
    return metrics[max(past)] if past else {}
