"""What a reader finds in a run's folder after its process died: whatever is there is old or new, and whole."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from next_core import History, open_checkpoints
from next_core.config import load_config
from next_core.cycle.journal import JOURNAL, read_journal
from next_core.cycle.run import CONFIG, RESULT, read_result
from next_core.report.inputs import open_folder
from next_core.storage.manifest import MANIFEST, check_manifest


def damages(out: Path) -> list[str]:
    """What in ``out`` cannot be read; ``out`` is the folder of a run, or of the callback's trainer."""
    # Ours are whole if they are there at all, the trainer's if they have a manifest.
    whole = [path.parent for path in out.glob(f"**/checkpoint-*/{MANIFEST}")]
    readers: list[tuple[Path, Callable[[], Any]]] = []
    for folder in (out, out / "next-core"):
        whole += [path for pattern in ("checkpoints/step-*", "jumps/[0-9]*") for path in folder.glob(pattern)]
        readers += [
            (folder / CONFIG, partial(load_config, folder / CONFIG)),
            (folder / JOURNAL, partial(read_journal, folder / JOURNAL)),
            (folder / JOURNAL, partial(open_folder, folder)),
            (folder / RESULT, partial(read_result, folder)),
            (folder / "checkpoints" / "step-000002", partial(_newest_motion, folder / "checkpoints")),
        ]
    readers += [(path, partial(check_manifest, path, contents=True)) for path in whole]
    found = []
    for there, read in readers:
        if there.exists():
            try:
                read()
            except Exception as error:  # whatever it is, it is told
                found.append(f"{there}: {type(error).__name__}: {error}")
    return found


def _newest_motion(checkpoints: Path) -> None:
    """As the command line reads a run; after a rollback its history starts anew, with no checkpoint yet."""
    source = open_checkpoints(checkpoints)
    if source.steps:
        history = History(source)
        history.inner_products([(history.newest, None)])
