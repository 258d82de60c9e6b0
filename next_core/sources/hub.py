"""Snapshots in a cache of the Hugging Face Hub: ``models--org--name/snapshots/<commit>``, with links to ``blobs``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from next_core.errors import CheckpointError
from next_core.sources.checkpoint_names import NUMBER, shown
from next_core.sources.tensor_files import COMMIT, SNAPSHOTS, hub_repo

REFS = "refs"
REVISIONS = "download each with revision= a branch or tag that ends in its step, such as step-100, or pass a list"


def is_repo(folder: Path) -> bool:
    """Whether a folder is one repository of a Hub cache."""
    return folder.name.startswith("models--") and (folder / SNAPSHOTS).is_dir()


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is one commit of a repository in a Hub cache."""
    repo = hub_repo(folder)
    return repo is not None and folder.resolve().parent.parent == repo


def snapshots(repo: Path) -> list[Path]:
    """The commits of a repository that are in the cache."""
    return sorted(path for path in (repo / SNAPSHOTS).iterdir() if COMMIT.fullmatch(path.name) and path.is_dir())


def in_cache(cache: Path) -> list[Path]:
    """One snapshot of each repository in a cache: the only one, or that of ``main``."""
    found = []
    for repo in sorted(path for path in cache.iterdir() if is_repo(path)):
        have = snapshots(repo)
        main = [path for path in have if "main" in _refs(path)]
        if len(have) > 1 and not main:
            raise CheckpointError(f"{repo} has {len(have)} snapshots and none is main; pass those you mean as a list")
        found += have if len(have) == 1 else main
    return found


def everything(path: Path) -> list[Path]:
    """All snapshots that a snapshot, a repository or a cache holds."""
    if is_snapshot(path):
        return [path]
    if path.name == SNAPSHOTS and is_repo(path.parent):
        path = path.parent
    repos = [path] if is_repo(path) else [child for child in path.iterdir() if is_repo(child)]
    return [snapshot for repo in repos for snapshot in snapshots(repo)]


def labels(folders: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """A name with the step in it for each snapshot, and notes on those that have none.

    Where one repository has several, by the branch or tag that points to each; else by the repository's name. Raises
    ``CheckpointError`` when no branch or tag of a repository tells its steps.
    """
    by_repo: dict[Path, list[Path]] = defaultdict(list)
    for folder in folders:
        by_repo[folder.resolve().parent.parent].append(folder)
    named: dict[str, Path] = {}
    notes = []
    for repo, have in by_repo.items():
        numbered = {folder: [ref for ref in _refs(folder) if NUMBER.search(ref)] for folder in have}
        if len(have) == 1 and (len(by_repo) > 1 or not numbered[have[0]]):
            named[repo.name] = have[0]
            continue
        if not any(numbered.values()):
            raise CheckpointError(f"no branch or tag tells the steps of the snapshots of {repo}; {REVISIONS}")
        for folder, refs in numbered.items():
            # v1.0 and step-100 may point to one commit
            about_steps = [ref for ref in refs if "step" in ref.lower()] or refs
            if len(about_steps) > 1:
                raise CheckpointError(f"{folder}: which of {shown(about_steps)} tells its step? {REVISIONS}")
            if about_steps:
                named[about_steps[0] if len(by_repo) == 1 else f"{repo.name}/{about_steps[0]}"] = folder
            else:
                notes.append(f"left out {folder}: no branch or tag tells its step")
    return named, notes


def _refs(snapshot: Path) -> list[str]:
    """The branches and tags that point to a snapshot."""
    root = snapshot.resolve().parent.parent / REFS
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else []
    found = []
    for path in files:
        try:
            commit = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue  # a damaged reference points nowhere
        if commit == snapshot.resolve().name:
            found.append(path.relative_to(root).as_posix())
    return found
