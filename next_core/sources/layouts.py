"""Where the checkpoint of each step lies, whichever trainer wrote it: folders' names -> steps."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from next_core.errors import CheckpointError
from next_core.sources import hub
from next_core.sources.checkpoint_names import MOST_STEPS, NUMBER, REMEDY, skeleton, steps_in_names
from next_core.sources.jumps import CHECKPOINTS, JUMPS, jump_places
from next_core.sources.tensor_files import SNAPSHOTS
from next_core.storage.manifest import INCOMPLETE, MANIFEST, check_manifest

LAYOUTS: dict[re.Pattern[str], tuple[str, ...]] = {
    re.compile(r"(?:checkpoint|step)-(\d+)"): ("",),  # transformers and TRL; this project
    re.compile(r"global_step(\d+)_hf"): ("",),  # OpenRLHF with --ckpt.save_hf
    re.compile(r"global_step_(\d+)"): ("actor/lora_adapter", "actor/huggingface"),  # verl
}
"""How trainers name the folder of a step, and where in it the weights may lie."""
WRITTEN_LAST = "tokenizer_config.json"
"""OpenRLHF writes the tokenizer last: without it one of its folders is incomplete."""
RUN_FOLDER = ("journal.jsonl", "config.yaml", JUMPS)
"""What lies beside the checkpoints of a run of this project."""
UNFINISHED = (".", "tmp-")
"""How names begin of folders that are being written."""
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
MODEL_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Found:
    """The checkpoints of a run: the folder of each step, ascending; how they are named; what should be known of it."""

    folders: dict[int, Path]
    naming: str = ""
    notes: tuple[str, ...] = ()


def find_checkpoints(path: Path, listed: Sequence[Path] = ()) -> Found:
    """The folder of each step: under ``path``, or those ``listed``.

    Under a folder, names that a trainer gives (``LAYOUTS``) win; else it may be a cache of the Hugging Face Hub, or
    hold adapters or models with steps in their names. Raises ``CheckpointError`` when a folder is missing, two stand
    for one step, or names leave a doubt. What is in the folders is not looked at.
    """
    if listed:
        return _listed(path, listed)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; pass the folder that holds checkpoint-N or step-N")
    named = {child: known for child in path.iterdir() if (known := step_folder(child)) is not None}
    if named:
        return _collected([(step, folder, _naming(child, folder)) for child, (step, folder) in named.items()])
    snapshots = _snapshots(path)
    if snapshots:
        return _from_hub(snapshots)
    found = _plain({child.name: child for child in _numbered(path)})
    without = [child for child in path.iterdir() if found.folders and not NUMBER.search(child.name) and _has(child)]
    notes = [f"left out {child}: no number in its name" for child in sorted(without)]
    return Found(found.folders, found.naming, (*found.notes, *notes))


def step_folder(path: Path) -> tuple[int, Path] | None:
    """The step that a folder's name stands for, and where in it the weights lie; None for any other folder.

    A link to a folder that is gone is a checkpoint that cannot be read, and not none.
    """
    for pattern, places in LAYOUTS.items():
        match = pattern.fullmatch(path.name)
        if match is not None and (path.is_dir() or (path.is_symlink() and not path.exists())):
            inside = [path / place for place in places]
            return int(match[1]), next((folder for folder in inside if folder.is_dir()), inside[0])
    return None


def holds(path: Path, files: Collection[str], listed: Sequence[Path] = ()) -> bool:
    """Whether some checkpoint under ``path``, or listed, holds one of these files."""
    if listed:
        return any(
            _has(known[1] if (known := step_folder(folder)) is not None else folder, files) or holds(folder, files)
            for folder in listed
        )
    if not path.is_dir():
        return False
    folders = [known[1] for child in path.iterdir() if (known := step_folder(child)) is not None]
    return any(_has(folder, files) for folder in folders or hub.everything(path) or _numbered(path))


def check_complete(folder: Path, contents: bool = False) -> None:
    """Raise ``CheckpointError`` for a folder that is incomplete by its manifest, or by OpenRLHF's order of writing.

    With ``contents`` all that its manifest names is read and compared with it.
    """
    if os.path.lexists(folder / INCOMPLETE):
        raise CheckpointError(f"{folder} was being written in place and is partly old; run that again first")
    if os.path.lexists(folder / MANIFEST) or (folder.name.startswith("step-") and _ours(folder)):
        check_manifest(folder, contents)
    if folder.name.endswith("_hf") and not (folder / WRITTEN_LAST).exists():
        raise CheckpointError(f"{folder} is incomplete: the tokenizer, written last, is missing; remove it")


def _ours(folder: Path) -> bool:
    """Whether a folder ``step-N`` is of this project, which writes a manifest last: by what lies around it."""
    above = folder.absolute().parent
    of_a_run = above.name == CHECKPOINTS and any(os.path.lexists(above.parent / name) for name in RUN_FOLDER)
    return of_a_run or next(above.glob(f"step-*/{MANIFEST}"), None) is not None


def common_folder(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds them all."""
    return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))


def _listed(root: Path, folders: Sequence[Path]) -> Found:
    rows: list[tuple[int, Path, str]] = []
    notes: list[str] = []
    plain: list[Path] = []
    snapshots: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; list the folders of the checkpoints")
        known = step_folder(folder)
        _refuse_jumps(root, folder if jump_places(folder) else folder.parent)
        if known is not None:
            rows.append((*known, _naming(folder, known[1])))
        elif _snapshots(folder):
            snapshots += _snapshots(folder)
        elif _has(folder) or not (inside := find_checkpoints(folder)).folders:
            plain.append(folder)
        else:
            rows += [(step, below, inside.naming) for step, below in inside.folders.items()]
            notes += inside.notes
    if plain:
        found = _plain({folder.absolute().relative_to(root.absolute()).as_posix(): folder for folder in plain})
        rows += [(step, folder, found.naming) for step, folder in found.folders.items()]
        notes += found.notes
    if snapshots:
        found = _from_hub(snapshots)
        rows += [(step, folder, found.naming) for step, folder in found.folders.items()]
        notes += found.notes
    return _collected(rows, notes)


def _refuse_jumps(root: Path, checkpoints: Path) -> None:
    """Jumps of a run folder are counted into its checkpoints only when these are opened as a whole."""
    jumped = any(place.is_dir() for place in jump_places(checkpoints))
    if jumped and checkpoints.resolve() != root.resolve():
        raise CheckpointError(f"{checkpoints} has jumps beside it, which a list does not count; open that folder alone")


def _collected(rows: Sequence[tuple[int, Path, str]], notes: Sequence[str] = ()) -> Found:
    found: dict[int, Path] = {}
    for step, folder, _ in rows:
        if step > MOST_STEPS:
            raise CheckpointError(f"{folder}: {step} is no step, it is too large; {REMEDY}")
        if step in found:
            raise CheckpointError(f"step {step} is there twice: {found[step]} and {folder}; remove one")
        found[step] = folder
    return Found(dict(sorted(found.items())), ", ".join(sorted({naming for *_, naming in rows})), tuple(notes))


def _naming(child: Path, folder: Path) -> str:
    return (Path(skeleton(child.name)) / folder.relative_to(child)).as_posix()


def _plain(named: dict[str, Path]) -> Found:
    """Folders of any name that has the step in it."""
    found = steps_in_names(sorted(named))
    rows = [(step, named[name], naming) for name, (step, naming) in found.items()]
    return _collected(rows, _read_from_names(found))


def _from_hub(snapshots: Sequence[Path]) -> Found:
    named, notes = hub.labels(snapshots)
    found = steps_in_names(sorted(named), hub.REVISIONS)
    rows = [(step, named[name], f"{naming} (Hub cache)") for name, (step, naming) in found.items()]
    return _collected(rows, [*notes, *_read_from_names(found)])


def _read_from_names(found: dict[str, tuple[int, str]]) -> list[str]:
    if not found:
        return []
    name, (step, _) = min(found.items(), key=lambda item: item[1])
    return [f"steps are read from names that no trainer here gives: {name} is taken as step {step}"]


def _snapshots(path: Path) -> list[Path]:
    """The snapshots that a folder stands for: a Hub cache, a repository in it, or one of its commits."""
    if hub.is_snapshot(path):
        return [] if any(step_folder(child) for child in path.iterdir()) else [path]
    if path.name == SNAPSHOTS and hub.is_repo(path.parent):
        path = path.parent
    if hub.is_repo(path):
        return hub.snapshots(path)
    return [snapshot for snapshot in hub.in_cache(path) if _has(snapshot)]


def _numbered(path: Path) -> list[Path]:
    """The folders in one of any name that may be checkpoints: they hold weights, or are named as one that does.

    None where the folder is a checkpoint itself: what lies in it is no step of the run.
    """
    if _has(path):
        return []
    children = [
        child
        for child in path.iterdir()
        if NUMBER.search(child.name) and not child.name.startswith(UNFINISHED) and child.is_dir()
    ]
    alike = {skeleton(child.name) for child in children if _has(child)}
    return [child for child in children if skeleton(child.name) in alike]


def _has(folder: Path, files: Collection[str] = (*MODEL_FILES, *MODEL_PICKLES, *ADAPTER_FILES)) -> bool:
    # A link that leads nowhere is a checkpoint too: a damaged one.
    return any(os.path.lexists(folder / file) for file in files)
