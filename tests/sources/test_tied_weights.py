"""Tied output heads: one parameter, whichever of its names a writer stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from next_core import open_checkpoints
from next_core.sources.full_model import FullModelSource
from next_core.sources.hf_model import ModelFiles
from tests.errors import raises_kind
from tests.sources.models import SMALL, built, model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NOTE = f"{HEAD} and {EMBEDDING} are one parameter, read once as {EMBEDDING}"


def save(root: Path, step: int, *stored: str, tied: bool | None = None, head: float | None = None) -> Path:
    values = dict.fromkeys(stored, float(step)) | ({HEAD: head} if head is not None else {})
    folder = model(root / f"checkpoint-{step}", step, **{k: torch.full((4, 2), v) for k, v in values.items()})
    if tied is not None:
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


def opened(root: Path) -> FullModelSource:
    return open_checkpoints(root)


@pytest.mark.parametrize("declared", [None, True])
def test_checkpoints_that_store_either_name_or_both_are_one_run(tmp_path: Path, declared: bool | None) -> None:
    save(tmp_path, 10, EMBEDDING, tied=declared)
    save(tmp_path, 20, EMBEDDING, HEAD, tied=declared)
    save(tmp_path, 30, HEAD, tied=declared)
    source = opened(tmp_path)
    assert [p.name for p in source.parameters] == [EMBEDDING, "w.weight"]
    assert source.tied == {HEAD: EMBEDDING}
    assert source.notes == [NOTE]
    for later, earlier in ((20, 10), (30, 20), (30, 10)):
        for name in (EMBEDDING, HEAD):
            assert torch.equal(source.delta(name, later, earlier), torch.full((4, 2), later - earlier).double())


@pytest.mark.parametrize(
    ("config", "one"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, False),
    ],
)
def test_two_names_are_one_parameter_if_the_config_says_so(tmp_path: Path, config: dict[str, Any], one: bool) -> None:
    for step in (10, 20):
        (save(tmp_path, step, EMBEDDING, HEAD) / "config.json").write_text(json.dumps(config))
    source = opened(tmp_path)
    assert [p.name for p in source.parameters] == [*([] if one else [HEAD]), EMBEDDING, "w.weight"]
    assert (source.tied, source.notes) == (({HEAD: EMBEDDING}, [NOTE]) if one else ({}, []))


@pytest.mark.parametrize(
    ("architecture", "config", "tied"),
    [("GemmaForCausalLM", "GemmaConfig", True), ("LlamaForCausalLM", "LlamaConfig", False)],
)
def test_without_the_flag_the_models_class_decides(tmp_path: Path, architecture: str, config: str, tied: bool) -> None:
    built(architecture, config, **SMALL).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert ModelFiles(tmp_path).declares_tie() is tied


def test_an_untied_head_must_be_in_every_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10, EMBEDDING, HEAD, tied=False)
    save(tmp_path, 20, EMBEDDING, tied=False)
    with raises_kind("checkpoint-other-model", "checkpoint-20", f"'{HEAD}'"):
        opened(tmp_path)


@pytest.mark.parametrize(("stored", "declared"), [((EMBEDDING, HEAD), True), ((EMBEDDING,), None)])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, stored: tuple[str, ...], declared: bool | None) -> None:
    save(tmp_path, 10, *stored, tied=declared)
    save(tmp_path, 20, EMBEDDING, tied=declared, head=21.0)
    with raises_kind("checkpoint-damaged", "checkpoint-20", f"'{HEAD}'", f"'{EMBEDDING}'"):
        opened(tmp_path)


def test_a_backbone_may_store_the_other_name(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 0, HEAD)
    save(tmp_path / "run", 10, EMBEDDING)
    source = open_checkpoints(tmp_path / "run", backbone=base)
    assert torch.equal(torch.as_tensor(source.delta(EMBEDDING, 10)), torch.full((4, 2), 10.0).double())


def test_a_tie_stays_when_later_checkpoints_store_both(tmp_path: Path) -> None:
    save(tmp_path, 10, EMBEDDING, tied=True)
    source = opened(tmp_path)
    save(tmp_path, 20, EMBEDDING, HEAD, tied=True)
    source.refresh()
    assert [p.name for p in source.parameters] == [EMBEDDING, "w.weight"]
    assert source.steps == (10, 20)
