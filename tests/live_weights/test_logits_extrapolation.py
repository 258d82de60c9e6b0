"""Extrapolated decoding against one forward pass of each adapter over the whole sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from next_core import generate_extrapolated
from tests.conftest import LoraRun

PROMPTS = torch.tensor([[0, 0, 5, 3], [7, 2, 9, 4]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.fixture
def model(lora_run: LoraRun) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(lora_run.base)
    model = PeftModel.from_pretrained(base, lora_run.folder(60), is_trainable=True)
    model.load_adapter(lora_run.folder(10), "early")
    return model.eval()


def logits(model: Any, adapter: str, row: Tensor) -> Tensor:
    """The logits of one adapter after a whole sequence without padding."""
    model.set_adapter(adapter)
    with torch.no_grad():
        found: Tensor = model(input_ids=row[None]).logits[0, -1]
    return found


def test_each_token_is_decoded_from_l1_plus_a_times_l2_minus_l1(model: Any) -> None:
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    made = generate_extrapolated(model, "early", "default", 3.0, input_ids=PROMPTS, attention_mask=MASK, **settings)
    for index, scores in enumerate(made.scores):
        for row, mask, score in zip(made.sequences, MASK, scores, strict=True):
            seen = row[: 4 + index][(4 - mask.sum()) :]
            l_1, l_2 = logits(model, "early", seen), logits(model, "default", seen)
            assert not torch.allclose(l_1, l_2, atol=1e-3)
            torch.testing.assert_close(score, l_1 + 3.0 * (l_2 - l_1), atol=1e-4, rtol=1e-4)
            assert row[4 + index] == score.argmax()


def test_adapters_and_what_trains_are_as_before(model: Any) -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(AttributeError):
        generate_extrapolated(model, "early", "default", input_ids="no tokens")
    generate_extrapolated(model, "early", "default", input_ids=PROMPTS, max_new_tokens=2)
    assert model.base_model.active_adapters == ["default"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
