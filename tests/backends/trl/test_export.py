"""What an applier writes from a run equals the live model that jumped: same prediction, same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from next_backends.trl import PredictExtendCallback
from next_core import History, make_applier, make_predictor, open_checkpoints
from next_core.live_weights.in_memory import InMemoryApplier
from tests.backends.trl.conftest import BASE
from tests.errors import raises_kind
from tests.sources.models import SMALL, built

pytestmark = pytest.mark.trl
SCHEDULE = {"observe": 6, "every": 3, "horizon": 3, "jump_every": 3}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.mark.parametrize(
    ("made", "then"),
    [
        ({"name": "secant", "space": "merged"}, {"name": "secant", "space": "factors"}),
        ({"name": "rl-extra"}, {"name": "relex"}),
        ({"name": "secant", "space": "factors"}, {"name": "alpharl"}),
    ],
    ids=["merged then factors", "rl-extra then relex", "factors then alpharl"],
)
def test_an_export_after_two_jumps_equals_the_live_model(
    make_trainer: Any, logits: Any, tmp_path: Path, made: dict[str, Any], then: dict[str, Any]
) -> None:
    callback = PredictExtendCallback(made, **SCHEDULE)
    trainer = make_trainer([callback], steps=12)
    trainer.train()
    assert sum(jump["accepted"] for jump in callback.journal.jumps()) >= 2

    # The run ended with a jump after step 12, and its checkpoints count that jump in.
    source = open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints", backbone=BASE)
    name, fields = then["name"], {k: v for k, v in then.items() if k != "name"}
    prediction = make_predictor(name, **fields).fit(History(source)).predict(3)
    make_applier("peft-adapter").apply(prediction, alpha=1.5, out=tmp_path / "adapter")
    make_applier("merged-model").apply(prediction, alpha=1.5, out=tmp_path / "merged")
    before = logits(trainer.model)
    InMemoryApplier().apply(prediction, alpha=1.5, out=trainer.model)
    live = logits(trainer.model)

    assert (live - before).abs().max() > 1e-3
    adapter = logits(PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(adapter, live, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("space", "folder"), [("factors", "."), ("merged", "."), ("merged", "trainer/next-core")])
def test_the_trainers_own_checkpoints_count_each_jump_once_wherever_the_run_folder_is(
    make_trainer: Any, logits: Any, tmp_path: Path, space: str, folder: str
) -> None:
    predictor = {"name": "secant", "window": 3, "space": space}
    callback = PredictExtendCallback(predictor, folder=tmp_path / folder, **SCHEDULE | {"settle": 3})
    trainer = make_trainer([callback], steps=9, save_strategy="steps", save_steps=3)
    trainer.train()
    source = open_checkpoints(tmp_path / "trainer", backbone=BASE)
    assert source.steps == (3, 6, 9)
    check_stay(source, trainer.model, logits, tmp_path)


@pytest.mark.parametrize(
    "lora",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}, {"bias": "all"}],
    ids=["modules_to_save", "embeddings", "bias"],
)
def test_other_trained_modules_are_exported(
    make_trainer: Any, logits: Any, tmp_path: Path, lora: dict[str, Any]
) -> None:
    callback = PredictExtendCallback({"name": "secant", "space": "factors"}, **SCHEDULE | {"settle": 2})
    trainer = make_trainer([callback], steps=9, lora=lora)
    trainer.train()
    source = open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints", backbone=BASE)
    assert source.skipped
    prediction = check_stay(source, trainer.model, logits, tmp_path)
    with raises_kind("checkpoint-unsupported-adapter", "peft-adapter"):
        make_applier("merged-model").apply(prediction, out=tmp_path / "merged")


def check_stay(source: Any, model: Any, logits: Any, folder: Path) -> Any:
    """An adapter that continues nothing is the model as it was trained."""
    prediction = make_predictor("stay").fit(History(source)).predict(3)
    make_applier("peft-adapter").apply(prediction, out=folder / "adapter")
    exported = logits(PeftModel.from_pretrained(base(), folder / "adapter"))
    torch.testing.assert_close(exported, logits(model), atol=1e-5, rtol=1e-5)
    return prediction


def test_experts_jump_whole_and_are_exported(make_trainer: Any, tokenizer: Any, logits: Any, tmp_path: Path) -> None:
    sizes = SMALL | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = built("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **sizes, **experts)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    callback = PredictExtendCallback("secant", **SCHEDULE)
    trainer = make_trainer([callback], steps=12, lora=False, learning_rate=1e-3, model=model)
    trainer.reward_funcs = [lambda completions, **_: [float(len(set(text))) for text in completions]]
    trainer.train()
    run = tmp_path / "trainer" / "next-core"
    matrices = sum(value.shape[0] if value.dim() == 3 else 1 for value in model.parameters() if value.dim() > 1)
    accepted = [jump["reason"] for jump in callback.journal.jumps() if jump["accepted"]]
    assert any(f" of {matrices} matrices, 9" in reason for reason in accepted)

    source = open_checkpoints(run / "checkpoints", backbone=tmp_path / "base")
    prediction = make_predictor("secant").fit(History(source)).predict(3)
    make_applier("merged-model").apply(prediction, out=tmp_path / "merged")
    InMemoryApplier().apply(prediction, out=trainer.model)
    live = logits(trainer.model)
    trainer.save_model(tmp_path / "saved")  # experts one by one, as the Hub has them
    for folder in (tmp_path / "merged", tmp_path / "saved"):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), live, atol=1e-5, rtol=1e-5)
