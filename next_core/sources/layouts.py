"""The folder of each step, whichever trainer wrote it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from next_core.errors import CheckpointError, ambiguous_step, damaged, incomplete, not_found
from next_core.sources import hub
from next_core.sources.checkpoint_names import LARGEST_STEP, NUMBER, REMEDY, pattern_of, steps_in_names
from next_core.sources.distributed_files import DISTRIBUTED
from next_core.sources.fsdp_shards import LORA, has_shards
from next_core.sources.jumps import CHECKPOINTS, JUMPS, jump_places
from next_core.storage.manifest import MANIFEST, check_manifest
from next_core.storage.reading import read_text

LAYOUTS: dict[re.Pattern[str], tuple[str, ...]] = {
    # transformers and TRL; this project; accelerate's examples; prime-rl's weights; NeMo-RL; prime-rl's own state
    re.compile(r"(?:checkpoint-|step[-_])(\d+)"): (
        *("", "policy/weights/model/consolidated", "policy/weights/model", "policy/weights", "trainer"),
    ),
    re.compile(r"global_step(\d+)_hf"): ("",),  # OpenRLHF with --ckpt.save_hf
    re.compile(r"global_step_(\d+)"): tuple(  # verl; SkyRL, whose actor is called policy
        f"{role}{place}" for role in ("actor", "policy") for place in ("/lora_adapter", "/huggingface", "")
    ),
}
"""How trainers name the folder of a step, and where in it the weights may be."""
WRITTEN_LAST = "tokenizer_config.json"  # OpenRLHF writes the tokenizer last: a folder without it is incomplete
RUN_FOLDER = ("journal.jsonl", "config.yaml", JUMPS)  # Lie next to the checkpoints of a run of this project
REFERENCE = "ref"  # The adapter in which TRL keeps the reference policy
JUMP_PREFIX = "jump-"
"""How the names of frozen jump adapters begin in a live model, and in the trainer's own checkpoints."""
UNFINISHED = (".", "tmp-")  # How the names of folders begin that are still being written
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
MODEL_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LORA_FILES = (LORA, f"../{LORA}")  # With one of these, what looks like a model is the state of one with an adapter
SHARDS = "model_world_size_W_rank_R.pt"  # Stands for the files of all ranks
WEIGHTS = (*MODEL_FILES, *MODEL_PICKLES, *ADAPTER_FILES, SHARDS, *DISTRIBUTED)
STABLE = "STABLE"  # prime-rl marks a step's weights by this file once they are complete
TRACKERS = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt")
"""verl and SkyRL write the step of a checkpoint here once it is complete."""
DEEPEST = 4  # How many folders below one the files are looked for
FOREIGN = {
    "dist_ckpt": "Megatron's shards: convert each with verl, python -m verl.model_merger merge --backend megatron "
    "--local_dir {above} --target_dir FOLDER, or save hf_model too (checkpoint.save_contents) and list its folders",
    "*_model_states.pt": "DeepSpeed's states alone: convert each, python zero_to_fp32.py {above} FOLDER "
    "--safe_serialization (the script lies there), or save with stage3_gather_16bit_weights_on_model_save",
    "pytorch_model_fsdp*.bin": "accelerate's FSDP states without torch's distributed checkpoint: save with "
    "SHARDED_STATE_DICT (use_dcp), or rename a FULL_STATE_DICT to pytorch_model.bin",
    "shard-*-model-*.safetensors": "a process's share of each tensor (NeMo): save with save_consolidated: true",
}
"""By the names of files or folders: what they are, and the remedy; ``{above}`` is the folder above."""


@dataclass(frozen=True)
class CheckpointFolders:
    """The folder of each step, ascending; the pattern of their names; notes for the user."""

    folders: dict[int, Path]
    naming: str = ""
    notes: tuple[str, ...] = ()

    def starting_at(self, start: Path) -> CheckpointFolders:
        """Return these with the adapter or model that RL began from as step 0. Raises ``CheckpointError``."""
        if 0 in self.folders:
            raise ambiguous_step(f"step 0 appears twice: {self.folders[0]} and the start {start}; omit the start")
        place = _weights_in(start)
        if not has_any(place):
            raise not_found(f"the start {start} contains neither an adapter nor a model")
        return replace(self, folders={0: place, **self.folders})


Rows = tuple[list[tuple[int, Path, str]], list[str]]
"""The step, folder and pattern of the name of each checkpoint; notes for the user."""


def find_checkpoints(path: Path, listed: Sequence[Path] = ()) -> CheckpointFolders:
    """Return the folder of each step under ``path``, or of those ``listed``, without looking at their files.

    Under a folder, names that a trainer gives (``LAYOUTS``) take precedence. Otherwise it may be a cache of the Hugging
    Face Hub, or contain adapters or models with steps in their names. Raises ``CheckpointError`` if a folder is
    missing, two have the same step, or names are ambiguous or of several runs.
    """
    return _collect(*(_rows_listed(path, listed) if listed else _rows_under(path)))


def _rows_under(path: Path) -> Rows:
    if not path.is_dir():
        raise not_found(f"{path} is not a folder; pass the folder that holds checkpoint-N or step-N")
    named = _trainers_folders(path)
    snapshots = [] if named else hub.find_snapshots(path, has_any)
    if snapshots:
        return _rows_from_hub(snapshots)
    children = [*named] or _numbered(path)
    patterns = sorted({pattern_of(child.name) for child in children})
    if len(patterns) > 1:
        raise ambiguous_step(f"{path} holds {' and '.join(patterns)}, as of several runs: list the folders of one")
    if named:
        return [(step, folder, _naming(child, folder)) for child, (step, folder) in named.items()], []
    rows, notes = _rows_from_names({child.name: child for child in children})
    ignored = [child for child in path.iterdir() if rows and not NUMBER.search(child.name) and has_any(child)]
    return rows, [*notes, *(f"ignored {child}: no number in its name" for child in sorted(ignored))]


def _trainers_folders(path: Path) -> dict[Path, tuple[int, Path]]:
    return {child: known for child in path.iterdir() if (known := step_folder(child)) is not None}


def step_folder(path: Path) -> tuple[int, Path] | None:
    """Return the step in a folder's name and where in it the weights are; None for a name that no trainer gives.

    A broken link is a checkpoint that cannot be read, not a folder to ignore.
    """
    for pattern, places in LAYOUTS.items():
        match = pattern.fullmatch(path.name)
        if match is not None and (path.is_dir() or (path.is_symlink() and not path.exists())):
            inside = [folder for place in places if (folder := path / place).is_dir()] or [path / places[0]]
            return int(match[1]), _weights_in(next(filter(has_any, inside), inside[0]))
    return None


def _weights_in(folder: Path) -> Path:
    """Return a folder, or its one subfolder with a named adapter if only that has weights."""
    named = [] if has_any(folder) else named_adapters(folder)
    return named[0] if len(named) == 1 else folder


def named_adapters(folder: Path) -> list[Path]:
    """Return the subfolders in which PEFT saved adapters that are not called "default", but references and jumps."""
    return sorted(
        path.parent
        for path in folder.glob(f"*/{ADAPTER_FILES[0]}")
        if path.parent.name != REFERENCE and not path.parent.name.startswith(JUMP_PREFIX)
    )


def contains_checkpoints(path: Path, files: Collection[str], listed: Sequence[Path] = ()) -> bool:
    """Return whether a checkpoint under ``path``, or listed, contains one of these files.

    Also true where names are ambiguous: opening the checkpoints reports why.
    """
    try:
        return any(has_any(folder, files) for folder in find_checkpoints(path, listed).folders.values())
    except CheckpointError:
        return True


def has_any(folder: Path, files: Collection[str] = WEIGHTS) -> bool:
    """Return whether a folder contains one of these files, broken links included."""
    return any(os.path.lexists(folder / file) for file in files) or (SHARDS in files and has_shards(folder))


def check_complete(folder: Path, contents: bool = False) -> None:
    """Raise ``CheckpointError`` for a folder that is incomplete by its manifest, or by its trainer's order of writing.

    With ``contents`` every file in the manifest is read and compared with it.
    """
    if os.path.lexists(folder / MANIFEST) or (folder.name.startswith("step-") and _is_ours(folder)):
        check_manifest(folder, contents)
    if folder.name.endswith("_hf") and not (folder / WRITTEN_LAST).exists():
        raise incomplete(folder, "has no tokenizer, which is written last")
    if (
        folder.name.startswith("step_")
        and not (folder / STABLE).exists()
        and any(folder.parent.glob(f"step_*/{STABLE}"))
    ):
        raise incomplete(folder, f"has no {STABLE}, which is written last")
    for above, tracker in itertools.product(folder.parents[:3], TRACKERS):
        known = step_folder(above)
        if known is not None and (above.parent / tracker).is_file():
            _check_tracker(above.parent / tracker, *known)


def _check_tracker(tracker: Path, step: int, folder: Path) -> None:
    """Raise ``CheckpointError`` for a step beyond the last one that its trainer completed."""
    try:
        last = int(read_text(tracker))
    except (OSError, ValueError) as error:
        raise damaged(tracker, f"does not name a step ({error})") from None
    if step > last:
        raise incomplete(folder, f"is not complete, or is left from before a resume: {tracker} says step {last}")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder ``step-N`` is of this project, which writes a manifest last, by what lies around it."""
    above = folder.absolute().parent
    in_run_folder = above.name == CHECKPOINTS and any(os.path.lexists(above.parent / name) for name in RUN_FOLDER)
    return in_run_folder or next(above.glob(f"step-*/{MANIFEST}"), None) is not None


def _rows_listed(root: Path, folders: Sequence[Path]) -> Rows:
    parts: list[Rows] = []
    plain: dict[str, Path] = {}
    snapshots: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise not_found(f"{folder} is not a folder; list the folders of the checkpoints")
        _refuse_jumps(root, folder if jump_places(folder) else folder.parent)
        known = step_folder(folder)
        if known is not None:
            parts.append(([(*known, _naming(folder, known[1]))], []))
        elif not _trainers_folders(folder) and (found := hub.find_snapshots(folder, has_any)):
            snapshots += found
        elif has_any(folder) or not (inside := _rows_under(folder))[0]:
            plain[folder.absolute().relative_to(root.absolute()).as_posix()] = folder
        else:
            parts.append(inside)
    parts += [_rows_from_names(plain), _rows_from_hub(snapshots)]
    return [row for rows, _ in parts for row in rows], [note for _, notes in parts for note in notes]


def _refuse_jumps(root: Path, checkpoints: Path) -> None:
    """Jumps of a run folder are added to its checkpoints only when these are opened as a whole."""
    has_jumps = any(place.is_dir() for place in jump_places(checkpoints))
    if has_jumps and checkpoints.resolve() != root.resolve():
        raise CheckpointError(
            f"{checkpoints} has jumps next to it, which a list would leave out; open that folder alone",
            kind="checkpoint-unknown-layout",
        )


def _collect(rows: Sequence[tuple[int, Path, str]], notes: Sequence[str]) -> CheckpointFolders:
    folders: dict[int, Path] = {}
    for step, folder, _ in rows:
        if step > LARGEST_STEP:
            raise ambiguous_step(f"{folder}: {step} is too large to be a step; {REMEDY}")
        if step in folders:
            raise ambiguous_step(f"step {step} appears twice: {folders[step]} and {folder}; remove one")
        folders[step] = folder
    return CheckpointFolders(dict(sorted(folders.items())), ", ".join(sorted({row[2] for row in rows})), tuple(notes))


def _naming(child: Path, folder: Path) -> str:
    return (Path(pattern_of(child.name)) / folder.relative_to(child)).as_posix()


def _rows_from_names(named: Mapping[str, Path], remedy: str = REMEDY, suffix: str = "") -> Rows:
    """Return rows for folders whose names contain their steps, and a note about how these were read."""
    found = steps_in_names(sorted(named), remedy)
    rows = [(step, named[name], f"{naming}{suffix}") for name, (step, naming) in found.items()]
    first = sorted(found.items(), key=lambda item: item[1])[:1]
    return rows, [f"steps are read from unknown names: {name} is taken as step {step}" for name, (step, _) in first]


def _rows_from_hub(snapshots: Sequence[Path]) -> Rows:
    named, notes = hub.names_with_steps(snapshots)
    rows, more_notes = _rows_from_names(named, hub.REMEDY, " (Hub cache)")
    return rows, [*notes, *more_notes]


def _numbered(path: Path) -> list[Path]:
    """Return the folders below one that may be checkpoints: they have weights, or are named like one that has.

    None if the folder is a checkpoint itself: what lies in it is not a step of the run.
    """
    if has_any(path):
        return []
    children = [
        child
        for child in path.iterdir()
        if NUMBER.search(child.name) and not child.name.startswith(UNFINISHED) and child.is_dir()
    ]
    patterns = {pattern_of(child.name) for child in children if has_any(child)}
    return [child for child in children if pattern_of(child.name) in patterns]


def foreign_layout(folder: Path) -> str | None:
    """Return what a folder holds that is not read, and the remedy; None if nothing is known of it."""
    for depth in range(DEEPEST + 1):
        for name, what in FOREIGN.items():
            found = next(folder.glob("*/" * depth + name), None)
            if found is not None:
                # verl: actor/dist_ckpt or actor/model/dist_ckpt. DeepSpeed: checkpoint-N/global_stepN/FILE.
                above = found.parents[1] if found.parent.name == "model" or found.is_file() else found.parent
                return f"{found} is of {what.format(above=above)}"
    return None
