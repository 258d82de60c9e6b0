"""Prompts with answers, which every backend here reads."""

import json
from pathlib import Path
from typing import Any

from next_core.errors import ConfigError, contradiction, describe
from next_core.run_config import DATA_FILES, HubDataset, TrainingSettings
from next_core.sources.hub import hub_folder
from next_core.storage.reading import read_text

COLUMNS = ("prompt", "answer")
Rows = list[dict[str, Any]]
MOST_BYTES = 2**32  # Size of the largest file of prompts that is read


def read_splits(training: TrainingSettings) -> dict[str, Rows]:
    """Read ``validation`` and ``test``; one that is not given is the same as the other. Raises ``ConfigError``."""
    data = training.data
    files = {"validation": data.validation or data.test, "test": data.test or data.validation}
    found = {split: read_rows(path) for split, path in files.items() if path is not None}
    for split, rows in found.items():
        if training.evaluation == "likelihood" and is_chat(rows):
            raise contradiction(f"the {split} prompts are conversations; set training.evaluation: generate")
    return found


def read_rows(source: Path | HubDataset) -> Rows:
    """Read a file of prompts or a dataset of the Hub. Raises ``ConfigError`` naming it and the row."""
    path = source if isinstance(source, Path) else source.name
    try:
        rows = _read_file(source) if isinstance(source, Path) else _read_dataset(source)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {describe(error)}", kind="config-data") from None
    if not rows:
        raise ConfigError(f"{path} holds no prompts", kind="config-data")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}, row {number} is not an object with the columns {', '.join(COLUMNS)}", kind="config-data"
            )
        missing = set(COLUMNS) - set(row)
        if missing:
            raise ConfigError(
                f"{path}, row {number} lacks the column(s) {', '.join(sorted(missing))}; it has {sorted(row)}",
                kind="config-data",
            )
    return rows


def _read_file(path: Path) -> Rows:
    """Read a file of JSON lines, or one that ``datasets`` reads."""
    kind = DATA_FILES.get(path.suffix)
    if kind is None:
        raise ConfigError(f"{path}: expected {', '.join(DATA_FILES)}", kind="config-data")
    if kind == "json":
        return [json.loads(line) for line in read_text(path, MOST_BYTES).split("\n") if line.strip()]
    from datasets import load_dataset

    return list(load_dataset(kind, data_files=str(path), split="train"))


def _read_dataset(source: HubDataset) -> Rows:
    """Read a dataset of the Hub, with our names of its columns."""
    folder = hub_folder(source.name, "dataset")
    from datasets import load_dataset

    rows = load_dataset(str(folder), source.config, split=source.split)
    return [row | {ours: row[theirs] for ours, theirs in source.columns.items()} for row in rows]


def is_chat(rows: Rows) -> bool:
    """Whether prompts are conversations (lists of messages) and not text. Raises ``ConfigError`` for a mixture."""
    chats = {not isinstance(row["prompt"], str) for row in rows}
    if len(chats) > 1:
        raise ConfigError(
            "some prompts are text and some are conversations; write all of them in one form", kind="config-data"
        )
    return chats.pop()
