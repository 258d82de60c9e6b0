"""The callback in trainers that do not generate: SFT, DPO and transformers' own. A step is then the unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from next_backends.trl import PredictExtendCallback
from tests.backends.trl.conftest import BASE, FACTORS, SMALL_RUN

pytestmark = pytest.mark.trl
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


def sft(tokenizer: Any, out: Path, callback: Any) -> Any:
    data = Dataset.from_list([{"text": prompt + answer} for prompt, answer in SUMS])
    more = {"train_dataset": data, "processing_class": tokenizer, "peft_config": LORA, "callbacks": [callback]}
    return SFTTrainer(model(), args=SFTConfig(str(out), **SETTINGS), **more)


def dpo(tokenizer: Any, out: Path, callback: Any) -> Any:
    data = Dataset.from_list([{"prompt": prompt, "chosen": answer, "rejected": "1"} for prompt, answer in SUMS])
    more = {"train_dataset": data, "processing_class": tokenizer, "peft_config": LORA, "callbacks": [callback]}
    return DPOTrainer(model(), args=DPOConfig(str(out), **SETTINGS), **more)


def plain(tokenizer: Any, out: Path, callback: Any) -> Any:
    data = Dataset.from_list([dict(tokenizer(prompt + answer)) for prompt, answer in SUMS])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model(), TrainingArguments(str(out), **SETTINGS), collate, data, callbacks=[callback])


@pytest.mark.parametrize("make", [sft, dpo, plain])
def test_steps_are_scaled_and_jumps_made_in_a_trainer_that_does_not_generate(
    make: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    scaling = PredictExtendCallback("auto")
    make(tokenizer, tmp_path / "scaling", scaling).train()
    multiples = [record["multiple"] for record in scaling.journal.records if record["event"] == "scale"]
    assert len(multiples) == 2
    assert multiples[-1] > 1.3  # supervised losses on easy sums go straight on
    jumping = PredictExtendCallback(FACTORS, observe=6, every=3, horizon=3, settle=3)
    make(tokenizer, tmp_path / "jumping", jumping).train()
    assert [(jump["step"], jump["accepted"]) for jump in jumping.journal.jumps()] == [(6, True)]
