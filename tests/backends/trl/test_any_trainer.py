"""The callback in trainers other than GRPO's and RLOO's. A step is then the unit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from next_backends.trl import PredictExtendCallback
from tests.backends.trl.conftest import BASE, MERGED, SMALL_RUN, exact, jumping
from tests.errors import raises_kind

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore:.*experimental")]
OF_GENERATION = {"num_generations", "max_completion_length", "beta"}
SETTINGS = {key: value for key, value in SMALL_RUN.items() if key not in OF_GENERATION} | {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-5,
}
SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(10, 20) for b in range(10, 20)]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def model() -> Any:
    set_seed(3)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def online_dpo(tokenizer: Any, out: Path, callback: Any, **fields: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    args = OnlineDPOConfig(str(out), max_new_tokens=4, **SETTINGS | fields)
    more = {"processing_class": tokenizer, "peft_config": LORA, "callbacks": [callback]}
    data = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in SUMS])
    return OnlineDPOTrainer(model(), reward_funcs=exact, args=args, train_dataset=data, **more)


def supervised(trainer: Any, config: Any, row: Callable[[str, str], dict[str, Any]], make: Any = model) -> Any:
    """Return what makes a trainer of a TRL class, with a row for each sum."""

    def build(tokenizer: Any, out: Path, callback: Any) -> Any:
        data = Dataset.from_list([row(prompt, answer) for prompt, answer in SUMS])
        started = make()
        lora = LORA if make is model else replace(LORA, task_type="SEQ_CLS")
        more = {"train_dataset": data, "processing_class": tokenizer, "peft_config": lora, "callbacks": [callback]}
        return trainer(started, args=config(str(out), **SETTINGS), **more)

    return build


def classifier() -> Any:
    set_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(BASE, dtype=torch.float32, num_labels=1)


def plain(tokenizer: Any, out: Path, callback: Any) -> Any:
    data = Dataset.from_list([dict(tokenizer(prompt + answer)) for prompt, answer in SUMS])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model(), TrainingArguments(str(out), **SETTINGS), collate, data, callbacks=[callback])


MAKERS = {
    "sft": supervised(SFTTrainer, SFTConfig, lambda prompt, answer: {"text": prompt + answer}),
    "dpo": supervised(DPOTrainer, DPOConfig, lambda p, a: {"prompt": p, "chosen": a, "rejected": "1"}),
    "kto": supervised(KTOTrainer, KTOConfig, lambda p, a: {"prompt": p, "completion": a, "label": a < "30"}),
    "reward": supervised(RewardTrainer, RewardConfig, lambda p, a: {"chosen": p + a, "rejected": p + "1"}, classifier),
    "plain": plain,
    "online_dpo": online_dpo,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_steps_are_scaled_and_jumps_made_in_any_trainer(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    make = MAKERS[kind]
    scaling = PredictExtendCallback("auto")
    make(tokenizer, tmp_path / "scaling", scaling).train()
    multiples = [record["multiple"] for record in scaling.journal.records if record["event"] == "scale"]
    assert len(multiples) == 2
    assert multiples[-1] > 1.3 or kind == "online_dpo"  # supervised losses on easy sums go straight on
    moving = jumping(settle=3)
    make(tokenizer, tmp_path / "jumping", moving).train()
    assert [(jump["step"], jump["accepted"]) for jump in moving.journal.jumps()] == [(6, True)]


def test_the_reward_of_online_dpo_is_the_probe_also_when_resumed(tokenizer: Any, tmp_path: Path, trained: Any) -> None:
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-7")):
        callback = PredictExtendCallback(MERGED, observe=6, every=3, horizon=3, settle=3, evaluate="reward")
        trainer = online_dpo(tokenizer, tmp_path, callback, save_steps=7, save_strategy="steps")
        trainer.train(resume_from_checkpoint=resume)
        (jump,) = callback.journal.jumps()
        assert 0 < jump["accuracy_after"] <= 1
        ends.append(trained(trainer.model))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("where", "field", "value", "name"),
    [
        ("args", "max_staleness", 4, "max_staleness"),  # TRL's AsyncGRPOConfig
        ("args", "async_prefetch", True, "async_prefetch"),  # axolotl's GRPO
        ("args", "teacher_model_kind", "ema", "factors"),  # TRL's SDPOConfig and SDFTConfig
        ("args", "vllm_lora_sync", True, "factors"),  # axolotl's GRPO
        ("model", "vllm_engine", object(), "factors"),  # Unsloth's fast inference
    ],
)
def test_jumps_unseen_by_rollouts_are_refused(make_trainer: Any, where: str, field: str, value: Any, name: str) -> None:
    trainer = make_trainer([jumping(MERGED)])
    setattr(getattr(trainer, where), field, value)
    with raises_kind("backend-unsupported", name):
        trainer.train()
