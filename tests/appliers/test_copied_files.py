"""What lies beside the weights comes along, and the model card says how the weights were made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from next_core import make_applier, open_checkpoints
from next_core.interfaces import CoefficientUpdate, Prediction
from tests.conftest import LoraRun

CARD = """---
base_model: somebody/base
license: apache-2.0
tags:
- math
---

# A model

Über all.
"""


@pytest.fixture
def run(make_lora_run: Callable[..., LoraRun], base: Path, tmp_path: Path) -> LoraRun:
    """A run whose backbone and checkpoints have real tokenizers, cards and more beside the weights."""
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
    for name in ("modeling_own.py", "generation_config.json", "LICENSE"):
        (run.base / name).write_text("{}")
    for name in ("trainer_state.json", "training_args.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (run.base / name).write_text("{}")
    (run.base / "original").mkdir()
    (run.base / "original" / "x.txt").write_text("x")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
        (run.folder(20) / name).write_text("{}")
    return run


def predict(run: LoraRun) -> Prediction:
    source = open_checkpoints(run.path, backbone=run.base)
    return Prediction(source, 20, 50, updates={n: CoefficientUpdate({20: 1.0, 10: -1.0}) for n in run.deltas[20]})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"}


@pytest.mark.parametrize(
    ("applier", "expected"),
    [
        (
            "merged-model",
            {"model.safetensors", "config.json", "generation_config.json", "modeling_own.py", "LICENSE"},
        ),
        ("peft-adapter", {"adapter_model.safetensors", "adapter_config.json"}),
    ],
)
def test_the_folder_has_what_a_loader_needs_and_nothing_of_the_trainer(
    run: LoraRun, tmp_path: Path, applier: str, expected: set[str]
) -> None:
    from transformers import AutoTokenizer

    make_applier(applier).apply(predict(run), 1.5, out=tmp_path / "out")
    assert files(tmp_path / "out") == {
        *expected,
        *TOKENIZER,
        "README.md",
        "extrapolation.json",
        "manifest.json",
    }
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    read = run.base if applier == "merged-model" else run.folder(20)
    theirs = AutoTokenizer.from_pretrained(read)
    assert ours("a b a")["input_ids"] == theirs("a b a")["input_ids"] == [1, 2, 1]
    assert ours.chat_template == {"default": "{{ messages[0].content }}", "tool": "{{ tool }}"}


@pytest.mark.parametrize("applier", ["merged-model", "peft-adapter"])
def test_the_card_keeps_its_front_matter_and_says_how_the_weights_were_made(
    run: LoraRun, tmp_path: Path, applier: str
) -> None:
    make_applier(applier).apply(predict(run), 1.5, out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.startswith(CARD)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"base_model": "somebody/base", "license": "apache-2.0", "tags": ["math"]}
    section = text.split("## How these weights were made")[1]
    for fact in ("step 20", "50 steps ahead", "alpha 1.5", f"`{applier}`"):
        assert fact in section
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (tmp_path / "out" / "extrapolation.json").read_text()


def test_without_a_card_there_is_one_with_a_front_matter(run: LoraRun, tmp_path: Path) -> None:
    (run.base / "README.md").unlink()
    make_applier("merged-model").apply(predict(run), out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1]) == {"library_name": "transformers"}
    assert "alpha 1\n" in text


def test_a_card_that_is_not_utf8_comes_through_unchanged(run: LoraRun, tmp_path: Path) -> None:
    (run.base / "README.md").write_bytes(b"# M\xfcller")
    make_applier("merged-model").apply(predict(run), out=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes().startswith(b"# M\xfcller\n\n## How")


def test_in_place_only_the_card_and_the_records_change_beside_the_weights(run: LoraRun, tmp_path: Path) -> None:
    target = Path(shutil.copytree(run.base, tmp_path / "target"))
    (target / "generation_config.json").write_text('{"own": 1}')
    make_applier("merged-model", in_place=True).apply(predict(run), out=target)
    assert files(target) == files(run.base) | {"extrapolation.json", "manifest.json"}
    assert json.loads((target / "generation_config.json").read_text()) == {"own": 1}


def test_vllm_loads_the_model(run: LoraRun, tmp_path: Path, logits: Callable[[Any], Tensor]) -> None:
    vllm = pytest.importorskip("vllm")
    from transformers import AutoModelForCausalLM

    make_applier("merged-model").apply(predict(run), out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    with torch.no_grad():
        expected = int(model(input_ids=torch.tensor([[1, 2, 1]])).logits[0, -1].argmax())
    engine = vllm.LLM(str(tmp_path / "out"), enforce_eager=True, dtype="float32", skip_tokenizer_init=True)
    prompt = {"prompt_token_ids": [1, 2, 1]}
    [answer] = engine.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False))
    assert answer.outputs[0].token_ids[0] == expected
