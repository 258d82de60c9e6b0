"""Records what the real OpenRLHF leaves on disk, in ``tests/sources/recorded/openrlhf``: a few minutes, by hand.

    make openrlhf-env && .venv/bin/python -m pytest -m openrlhf tests/backends/openrlhf/cpu/record.py

Three runs of three steps of a very small Qwen2, each saved by OpenRLHF itself after each step:

- ``lora-zero2``: adapters (``global_stepN_hf``), DeepSpeed's states of the last step (``_actor/global_step3``), and in
  ``masters.safetensors`` what DeepSpeed's own ``zero_to_fp32`` makes of these;
- ``lora-zero3``: adapters, which OpenRLHF then saves as pickles (``adapter_model.bin``);
- ``full-zero2``: models.

``base`` is the model that they began with. The path of the base model is taken out of the adapters' configs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_backends.openrlhf.checkpoint_folders import finished_models
from next_backends.openrlhf.environment import TRAINER_SIDE
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.trainer import Trainer
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.config import make_config
from next_core.run_config import RunConfig

pytestmark = pytest.mark.openrlhf

RECORDED = Path(__file__).parents[3] / "sources" / "recorded" / "openrlhf"
STEPS = 3
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
KEPT = ("adapter_config.json", "adapter_model.*", "config.json", "model.safetensors", *TOKENIZER)

Train = Callable[..., Path]


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


@pytest.fixture
def train(base: Path, openrlhf_backend: Callable[..., dict[str, Any]], tmp_path: Path) -> Train:
    """``train(name, zero, lora)``: a run, and the new folder of this name with what OpenRLHF saved of each step."""
    rows = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8))
    prompts = tmp_path / "train.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(name: str, zero: int, lora: dict[str, Any] | None) -> Path:
        run: RunConfig = make_config(
            {
                "steps": STEPS,
                "save_every": 1,
                "predictor": "stay",
                "schedule": {"observe": STEPS, "every": 1, "horizon": 1},
                "training": {
                    "model": str(base),
                    "data": {"train": str(prompts)},
                    "lora": lora,
                    "reward": f"{__name__}:share_of_digits",
                    "prompts_per_step": 4,
                    "generations": 4,
                    "max_new_tokens": 8,
                    "learning_rate": 1e-3,
                },
                "backend": openrlhf_backend(max_length=32, save_hf=True, deepspeed={"zero_stage": zero}),
            }
        )
        config = OpenRlhfConfig.model_validate(run.backend.fields)
        setup = TrainerSetup(run, config, tmp_path)
        setup.serve_rewards()
        setup.write_prompts(0, STEPS)
        try:
            trainer = Trainer(setup, setup.options(0, steps=STEPS), ["lora"] if lora is not None else [])
            try:
                trainer.wait_for_end()
            finally:
                trainer.kill()
        finally:
            setup.close()
        models = finished_models(setup.states(0))
        assert list(models) == list(range(1, STEPS + 1))
        folder = RECORDED / name
        shutil.rmtree(folder, ignore_errors=True)
        for model in models.values():
            _copy(model, folder / model.name)
        return folder

    return start


def _copy(model: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for pattern in KEPT:
        for path in model.glob(pattern):
            shutil.copyfile(path, target / path.name)
    config = target / "adapter_config.json"
    if config.exists():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}, indent=1))


def test_lora_zero2(train: Train, openrlhf_backend: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = train("lora-zero2", zero=2, lora={"rank": 2, "alpha": 4})
    state = tmp_path / "trainer" / "ckpt-000000" / "_actor" / f"global_step{STEPS}"
    shutil.copytree(state, folder / "_actor" / state.name)
    masters, block = folder / "masters.safetensors", openrlhf_backend()
    command = [block["python"], str(TRAINER_SIDE / "masters.py"), str(state), str(masters)]
    subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", **block["env"]})
    trained = {key: value for key, value in load_file(masters).items() if ".lora_" in key}
    assert trained
    save_file(trained, masters)


def test_lora_zero3(train: Train) -> None:
    folder = train("lora-zero3", zero=3, lora={"rank": 2, "alpha": 4})
    assert len(list(folder.glob("*/adapter_model.bin"))) == STEPS


def test_full_zero2(train: Train) -> None:
    folder = train("full-zero2", zero=2, lora=None)
    assert len(list(folder.glob("*/model.safetensors"))) == STEPS
