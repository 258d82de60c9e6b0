"""Snapshots in a cache of the Hugging Face Hub: read through their links, with steps from names or revisions."""

import hashlib
import os
from pathlib import Path

from next_core import open_checkpoints
from tests.errors import raises_kind
from tests.sources.models import adapter


def download(cache: Path, repo: str, step: int, *refs: str) -> Path:
    """Write a repository as huggingface_hub does: files in blobs, links in a snapshot, references to its commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(f"{repo}{step}".encode()).hexdigest()
    plain = adapter(cache / ".scratch" / commit, step)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


def test_repositories_of_one_cache_have_their_steps_in_their_names(tmp_path: Path) -> None:
    for step in (100, 200):
        download(tmp_path, f"org/qwen2.5-lora-step{step}", step, "main")
    download(tmp_path, "org/qwen2.5-lora-step200", 999)  # an older commit of the same repository
    source = open_checkpoints(tmp_path)
    assert (source.name, source.steps) == ("peft-adapter", (100, 200))
    assert source.naming == "models--org--qwen2.5-lora-stepN (Hub cache)"
    assert float(source.delta(source.parameters[0].name, 200, 100).dense().mean()) == 200


def test_snapshots_of_one_repository_have_their_steps_from_its_branches_and_tags(tmp_path: Path) -> None:
    got = [download(tmp_path, "org/run-1", step, f"step-{step}", "v1.0") for step in (100, 200)]
    newest = download(tmp_path, "org/run-1", 300, "main")
    repo = tmp_path / "models--org--run-1"
    for given in (repo, repo / "snapshots", got):
        source = open_checkpoints(given)
        assert (source.steps, source.naming) == ((100, 200), "step-N (Hub cache)")
        assert any(str(newest) in note for note in source.notes) is (given is not got)


def test_downloaded_snapshots_are_a_list(tmp_path: Path) -> None:
    got = [download(tmp_path, f"org/lora-{step}", step, "main") for step in (100, 200)]
    assert open_checkpoints(got).steps == (100, 200)
    assert open_checkpoints([path.parents[1] for path in got]).steps == (100, 200)
    (got[0] / "adapter_model.safetensors").unlink()
    with raises_kind("checkpoint-incomplete", got[0] / "adapter_model.safetensors"):
        open_checkpoints(got)


def test_snapshots_whose_steps_are_unknown_are_named(tmp_path: Path) -> None:
    got = [download(tmp_path, "org/run", step) for step in (100, 200)]
    for given in (got, tmp_path):
        with raises_kind("checkpoint-ambiguous-step", "models--org--run"):
            open_checkpoints(given)
    newest = download(tmp_path, "org/run", 300, "step-300", "iter-301-step")
    with raises_kind("checkpoint-ambiguous-step", newest, "iter-301-step, step-300"):
        open_checkpoints(tmp_path / "models--org--run")


def test_a_snapshot_that_contains_a_trainers_folders_is_read_through_its_links(tmp_path: Path) -> None:
    root = tmp_path / "models--org--run" / "snapshots" / ("0" * 40)
    (tmp_path / "models--org--run" / "blobs").mkdir(parents=True)
    for step in (10, 20):
        folder = adapter(root / f"checkpoint-{step}", step)
        for file in list(folder.iterdir()):
            blob = file.rename(tmp_path / "models--org--run" / "blobs" / f"{step}{file.suffix}")
            file.symlink_to(blob)
    for given in (root, [root]):
        assert open_checkpoints(given).steps == (10, 20)


def test_a_link_out_of_a_repository_is_refused(tmp_path: Path) -> None:
    snapshot = download(tmp_path, "org/lora-100", 100, "main")
    stranger = download(tmp_path, "org/lora-200", 200, "main")
    weights = snapshot / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to((stranger / weights.name).resolve())
    with raises_kind("checkpoint-unsafe-path", weights):
        open_checkpoints(tmp_path)
