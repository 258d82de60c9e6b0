"""Records what the real OpenRLHF leaves on disk, in ``tests/sources/recorded/openrlhf``: a few minutes, by hand.

    make openrlhf-env && .venv/bin/python -m pytest -m openrlhf tests/backends/openrlhf/cpu/record.py

Three runs of three steps of a very small Qwen2, each saved by OpenRLHF itself after each step:

- ``lora-zero2``: adapters (``global_stepN_hf``), DeepSpeed's states of the last step (``_actor/global_step3``), and in
  ``masters.safetensors`` what DeepSpeed's own ``zero_to_fp32`` makes of these;
- ``lora-zero3``: adapters, which OpenRLHF then saves as pickles (``adapter_model.bin``);
- ``full-zero2``: models.

``base`` is the model that they began with. The path of the base model is taken out of the adapters' configs.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core.config import make_config
from next_core.cycle.run import run

pytestmark = pytest.mark.openrlhf

RECORDED = Path(__file__).parents[3] / "sources" / "recorded" / "openrlhf"
STEPS = 3
READ = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], None, True, tag=sys.argv[3], exclude_frozen_parameters=True)
"""
KEPT = ("adapter_config.json", "adapter_model.*", "config.json", "model.safetensors", "tokenizer*.json")


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that a random model earns now and then."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


@pytest.fixture(scope="module")
def base() -> Path:
    """A random Qwen2 with the recorded tokenizer of single characters; the engines' attention needs heads of 32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **tokens, max_position_embeddings=128))
    model.to(torch.bfloat16).save_pretrained(RECORDED / "base")
    return RECORDED / "base"


@pytest.mark.parametrize(
    ("name", "zero", "lora"), [("lora-zero2", 2, 2), ("lora-zero3", 3, 2), ("full-zero2", 2, None)]
)
def test_record(
    name: str, zero: int, lora: int | None, base: Path, openrlhf_backend: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    prompts, folder = tmp_path / "train.jsonl", RECORDED / name
    rows = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backend = openrlhf_backend(max_length=32, save_hf=True, keep_hf=STEPS, deepspeed={"zero_stage": zero})
    training = {
        "model": str(base),
        "data": {"train": str(prompts)},
        "lora": None if lora is None else {"rank": lora, "alpha": 2 * lora},
        "reward": f"{__name__}:share_of_digits",
        "prompts_per_step": 4,
        "generations": 4,
        "max_new_tokens": 8,
        "learning_rate": 1e-3,
    }
    block = {
        "steps": STEPS,
        "save_every": 1,
        "predictor": "stay",
        "schedule": {"observe": STEPS, "every": 1, "horizon": 1},
    }
    run(make_config({**block, "training": training, "backend": backend}), tmp_path / "run")
    states = tmp_path / "run" / "trainer" / "ckpt-000000"
    shutil.rmtree(folder, ignore_errors=True)
    for step in range(1, STEPS + 1):
        _copy(states / f"global_step{step}_hf", folder / f"global_step{step}_hf")
    assert len(list(folder.glob("*/adapter_model.bin"))) == (STEPS if name == "lora-zero3" else 0)
    if name == "lora-zero2":
        state = states / "_actor" / f"global_step{STEPS}"
        shutil.copytree(state, folder / "_actor" / state.name)
        command = [backend["python"], "-c", READ, str(state.parent), str(tmp_path / "masters"), state.name]
        subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", **backend["env"]})
        masters = load_file(tmp_path / "masters" / "model.safetensors")
        save_file({k: value for k, value in masters.items() if ".lora_" in k}, folder / "masters.safetensors")


def _copy(model: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for pattern in KEPT:
        for path in model.glob(pattern):
            shutil.copyfile(path, target / path.name)
    config = target / "adapter_config.json"
    if config.exists():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}, indent=1))
