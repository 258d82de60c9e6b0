"""Names of the Hugging Face Hub, and its cache: ``models--org--name/snapshots/<commit>``, with links to ``blobs``.

``huggingface_hub.scan_cache_dir`` would need that package and read the size of every file of every repository.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from next_core.errors import ConfigError, ambiguous_step, describe
from next_core.process.optional_packages import import_optional
from next_core.sources.checkpoint_names import NUMBER, shorten
from next_core.storage.reading import read_text

SNAPSHOTS, BLOBS, REFS = "snapshots", "blobs", "refs"
COMMIT = re.compile(r"[0-9a-f]{40}")
REMEDY = "download each with revision= a branch or tag that ends in its step, such as step-100, or pass a list"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
"""``owner/name`` or ``owner/name@revision``. A file or folder of that path takes precedence."""
UNREAD = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*"]
"""Files of a model that nothing here reads: other formats, most of them pickles."""


def hub_repo(folder: Path) -> Path | None:
    """Return the repository of a Hub cache whose snapshot a folder is or lies in."""
    here = folder.resolve()
    for path in (here, *here.parents):
        if COMMIT.fullmatch(path.name) and path.parent.name == SNAPSHOTS and "--" in path.parent.parent.name:
            return path.parent.parent
    return None


def find_snapshots(path: Path, has_weights: Callable[[Path], bool]) -> list[Path]:
    """Return the snapshots that ``path`` stands for: itself, those of a repository, or one of each in a cache.

    Of a repository in a cache it is the only snapshot, or the one of ``main``, if it ``has_weights``. Raises
    ``CheckpointError`` if there are several and none is ``main``.
    """
    repo = hub_repo(path)
    if repo is not None and path.resolve().parent.parent == repo:
        return [path]
    if path.name == SNAPSHOTS and _is_repo(path.parent):
        path = path.parent
    if _is_repo(path):
        return _snapshots(path)
    current = [_current(repo) for repo in sorted(child for child in path.iterdir() if _is_repo(child))]
    return [snapshot for snapshot in current if snapshot is not None and has_weights(snapshot)]


def _is_repo(folder: Path) -> bool:
    return folder.name.startswith("models--") and (folder / SNAPSHOTS).is_dir()


def _snapshots(repo: Path) -> list[Path]:
    return sorted(path for path in (repo / SNAPSHOTS).iterdir() if COMMIT.fullmatch(path.name) and path.is_dir())


def _current(repo: Path) -> Path | None:
    snapshots = _snapshots(repo)
    if len(snapshots) > 1:
        snapshots, count = [path for path in snapshots if "main" in _refs(path)], len(snapshots)
        if not snapshots:
            raise ambiguous_step(f"{repo} has {count} snapshots and none is main; pass a list of those to read")
    return snapshots[0] if snapshots else None


def names_with_steps(snapshots: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Return a name that contains the step for each snapshot, and notes about those that have none.

    It is the repository's name, or the branch or tag that points to the snapshot if its repository has several. Raises
    ``CheckpointError`` where branches and tags do not tell the steps.
    """
    repos = [snapshot.resolve().parent.parent for snapshot in snapshots]
    named: dict[str, Path] = {}
    notes = []
    for snapshot, repo in zip(snapshots, repos, strict=True):
        refs = [ref for ref in _refs(snapshot) if NUMBER.search(ref)]
        refs = [ref for ref in refs if "step" in ref.lower()] or refs  # v1.0 and step-100 may point to one commit
        if repos.count(repo) == 1 and (len(snapshots) > 1 or not refs):
            named[repo.name] = snapshot
        elif len(refs) > 1:
            raise ambiguous_step(f"{snapshot}: which of {shorten(refs)} is its step? {REMEDY}")
        elif refs:
            named[refs[0] if len(set(repos)) == 1 else f"{repo.name}/{refs[0]}"] = snapshot
        else:
            notes.append(f"ignored {snapshot}: no branch or tag tells its step")
    if snapshots and not named:
        raise ambiguous_step(f"no branch or tag tells the steps of the snapshots of {repos[0]}; {REMEDY}")
    return named, notes


def _refs(snapshot: Path) -> list[str]:
    """Return the branches and tags that point to a snapshot."""
    snapshot = snapshot.resolve()
    root, refs = snapshot.parent.parent / REFS, []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        with contextlib.suppress(OSError, ValueError):  # a damaged reference points nowhere
            if read_text(path).strip() == snapshot.name:
                refs.append(path.relative_to(root).as_posix())
    return refs


def hub_folder(name: str, kind: Literal["model", "dataset"] = "model", online: bool = True) -> Path:
    """Return the folder of a model or dataset in the cache of the Hub, downloaded first where it is not there.

    ``HF_HUB_OFFLINE`` and ``HF_HOME`` have the meaning that huggingface_hub gives them. Raises ``ConfigError``.
    """
    import_optional("huggingface_hub", "trl")
    from huggingface_hub import snapshot_download

    ignored = UNREAD if kind == "model" else None
    repository, _, revision = name.partition("@")
    problem = ""
    for local in (True, False) if online else (True,):
        try:
            found = snapshot_download(
                repository, repo_type=kind, revision=revision or None, ignore_patterns=ignored, local_files_only=local
            )
        except Exception as error:  # of huggingface_hub, or of its client for HTTP
            problem = describe(error)
            continue
        folder = Path(found)
        # The cache does not know what is missing of a model of which single files were downloaded.
        if kind == "dataset" or any(folder.glob("*.safetensors")):
            return folder
        problem = f"{folder} holds no safetensors"
    download = f"hf download {repository} --repo-type {kind}" + (f" --revision {revision}" if revision else "")
    raise ConfigError(
        f"'{name}' is no path here, and as a {kind} of the Hugging Face Hub it is not in the cache and could not be "
        f"downloaded ({problem}); run `{download}` where there is a network, or give a path",
        kind="config-missing-file",
    )
