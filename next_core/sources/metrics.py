"""The metrics that a trainer logged, by step."""

import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError, damaged, other_model
from next_core.sources.checkpoint_names import LARGEST_STEP
from next_core.sources.layouts import RUN_FOLDER
from next_core.sources.tensor_files import read_json
from next_core.storage.json_lines import parse_json_line
from next_core.storage.reading import LARGE, read_bytes

METRICS = "metrics.jsonl"
STATE = "trainer_state.json"


def read_metrics(folders: Mapping[int, Path]) -> dict[int, dict[str, float]]:
    """Return metrics by step: from the newest ``trainer_state.json``, else from ``metrics.jsonl`` of a run folder."""
    if not folders:
        return {}
    newest = folders[max(folders)]
    if not os.path.lexists(newest / STATE):
        return by_step(read_log(newest.parent.parent / METRICS))
    return by_step(_trainers_log(newest))


def _trainers_log(folder: Path) -> list[Any]:
    logged = read_json(folder / STATE, LARGE, verify=True).get("log_history", [])
    if not isinstance(logged, list):
        raise damaged(folder / STATE, "has a log_history that is not a list")
    return logged


def check_one_run(folders: Mapping[int, Path], steps: Collection[int]) -> None:
    """Raise ``CheckpointError`` if the log in a checkpoint, at one of ``steps``, does not continue the one before.

    Then a run wrote over the first checkpoints of another one.
    """
    for before, step in itertools.pairwise(folders):
        if {before, step} & set(steps) and all(os.path.lexists(folders[each] / STATE) for each in (before, step)):
            try:
                began, logged = (_trainers_log(folders[each]) for each in (before, step))
            except CheckpointError:
                continue  # whoever reads the metrics hears of it
            if str(logged[: len(began)]) != str(began):  # as text NaN equals itself
                raise other_model(
                    f"{folders[step]}: its log ({STATE}) does not continue that of {folders[before]}, so it is left of "
                    "another run in the same folder: remove it, or list the checkpoints of one run"
                )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``, if there is one, without a torn last line.

    Next to a journal the file is ours: any other damage raises ``CheckpointError`` with the line. Elsewhere lines
    without a valid checksum are ignored.
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
        raise CheckpointError(
            f"{path} is damaged ({error}); restore it, or remove it to predict without metrics",
            kind="checkpoint-damaged",
        ) from None
    return records


def by_step(logged: Sequence[Any]) -> dict[int, dict[str, float]]:
    """Return the finite numbers in logged records, by step."""
    metrics: dict[int, dict[str, float]] = {}
    for record in logged:
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] <= LARGEST_STEP:
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
            metrics.setdefault(record["step"], {}).update(finite)
    return metrics
