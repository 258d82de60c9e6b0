"""A folder that holds an earlier run when a training begins at step 0: the same script was started again."""

import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from next_core.cycle.journal import JOURNAL, counted_records, read_journal
from next_core.errors import ConfigError
from next_core.sources.jumps import CHECKPOINTS, JUMPS
from next_core.sources.metrics import METRICS
from next_core.storage.atomic import move_directory
from next_core.storage.manifest import MANIFEST

EARLIER = "earlier"  # Prefix of the folders in which finished runs are kept


def make_room(folder: Path, settings: Mapping[str, Any], output: Path) -> None:
    """Make room for a run in its folder. Raises ``ConfigError`` for one that would be lost.

    ``settings`` are what the journal's first record has; ``output`` is the trainer's folder. A finished run of the same
    settings is moved aside. An unfinished one without a checkpoint of the trainer cannot be resumed: it is given up.
    """
    journal = folder / JOURNAL
    records = counted_records(read_journal(journal)) if journal.exists() else []
    if not records:
        journal.unlink(missing_ok=True)
        return
    other = next((key for key, value in settings.items() if records[0].get(key) != value), None)
    if other is not None:
        raise ConfigError(
            f"{folder} holds another run: its {other} is {records[0].get(other)}, not {settings[other]}; pass another "
            "folder= or overwrite=True to the callback",
            kind="config-other-run",
        )
    last = max(record["step"] for record in records)
    if any(record["event"] == "end" for record in records):
        aside = next(path for path in (folder / f"{EARLIER}-{n}" for n in count(1)) if not path.exists())
        aside.mkdir()
        for name in (METRICS, CHECKPOINTS, JUMPS, "report", JOURNAL):  # the journal last: without it there is no run
            if (folder / name).exists():
                move_directory(folder / name, aside / name)
        said = f"the finished run in {folder} was moved to {aside.name}, and this one starts"
    elif any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MANIFEST}")):
        raise ConfigError(
            f"{folder} holds this run up to step {last}, and {output} has checkpoints to resume it from: pass "
            "resume_from_checkpoint=True to trainer.train, or overwrite=True to the callback to start again",
            kind="config-other-run",
        )
    else:
        journal.unlink()
        said = f"the run in {folder} ended after step {last} without a checkpoint of the trainer: it starts again"
    logging.getLogger(__name__).warning(said)
