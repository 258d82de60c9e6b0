"""Files besides the weights are copied, and the model card says how the weights were made."""

import shutil
from pathlib import Path

import pytest
import yaml

from next_core import make_applier
from tests.appliers.conftest import BOTH, secant
from tests.conftest import LoraRun, MakeRun

CARD = """---
base_model: somebody/base
license: apache-2.0
tags:
- math
---

# A model

Über all.
"""
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"}
EXPECTED = {
    "merged-model": {"model.safetensors", "config.json", "generation_config.json", "modeling_own.py", "LICENSE"},
    "peft-adapter": {"adapter_model.safetensors", "adapter_config.json"},
}


@pytest.fixture
def full_folders(make_lora_run: MakeRun, base: Path, tmp_path: Path) -> LoraRun:
    """A run whose backbone and newest checkpoint have real tokenizers, cards and files of a trainer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    run = make_lora_run(tmp_path / "run" / "checkpoints", (10, 20))
    run.base = Path(shutil.copytree(base, tmp_path / "base"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    for folder in (run.base, run.folder(20)):
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        tokenizer.save_pretrained(folder)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    not_copied = ["trainer_state.json", "training_args.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"]
    for name in ("modeling_own.py", "generation_config.json", "LICENSE", *not_copied):
        (run.base / name).write_text("{}")
    (run.base / "original").mkdir()
    (run.base / "original" / "x.txt").write_text("x")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
        (run.folder(20) / name).write_text("{}")
    return run


@BOTH
def test_a_folder_has_a_loaders_files_and_a_card_and_no_trainers(
    full_folders: LoraRun, tmp_path: Path, applier: str
) -> None:
    from transformers import AutoTokenizer

    run, out = full_folders, tmp_path / "out"
    make_applier(applier).apply(secant(run), 1.5, out=out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*EXPECTED[applier], *TOKENIZER, "README.md", "extrapolation.json", "manifest.json"}
    ours = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(run.base if applier == "merged-model" else run.folder(20))
    assert ours("a b a")["input_ids"] == theirs("a b a")["input_ids"] == [1, 2, 1]
    assert ours.chat_template == {"default": "{{ messages[0].content }}", "tool": "{{ tool }}"}

    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith(CARD)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"base_model": "somebody/base", "license": "apache-2.0", "tags": ["math"]}
    section = card.split("## How these weights were made")[1]
    for fact in ("step 20", "10 steps ahead", "alpha 1.5", f"`{applier}`"):
        assert fact in section
    assert str(tmp_path) not in card + (out / "extrapolation.json").read_text()


def test_without_a_card_there_is_one_with_a_front_matter(run: LoraRun, tmp_path: Path) -> None:
    make_applier("merged-model").apply(secant(run), out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1]) == {"library_name": "transformers"}
    assert "alpha 1\n" in text


def test_a_card_that_is_not_utf8_keeps_its_bytes(run: LoraRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.base, tmp_path / "base"))
    (base / "README.md").write_bytes(b"# M\xfcller")
    make_applier("merged-model", backbone=base).apply(secant(run), out=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes().startswith(b"# M\xfcller\n\n## How")
