"""The real OpenRLHF on a CPU, and a model and prompts small enough for it: a step is well under a second."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = Path(__file__).parent / "cpu"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-core"
ENVIRONMENT = Path(os.environ.get("OPENRLHF_ENV") or CACHE / "openrlhf-venv").expanduser().absolute()

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-=*/()?.,:abcdefghijklmnopqrstuvwxyz"  # no space: Qwen2Tokenizer would drop it


@pytest.fixture(scope="session")
def openrlhf_python() -> Path:
    """The Python that OpenRLHF is installed for."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".next-core-stamp").exists() or not python.exists():
        pytest.fail(f"OpenRLHF is not installed in {ENVIRONMENT}: run `make openrlhf-env`")
    return python


@pytest.fixture(scope="session")
def openrlhf_env() -> dict[str, str]:
    """Environment variables with which it needs no GPU and no network."""
    return {
        "PYTHONPATH": str(CPU / "shim"),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(ENVIRONMENT.parent / "openrlhf-torch-extensions"),
        "MAX_JOBS": "2",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@pytest.fixture(scope="session")
def openrlhf_backend(openrlhf_python: Path, openrlhf_env: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """``openrlhf_backend(**changes)``: a whole ``backend:`` block; a change that is a dict goes into its block."""

    def make(**changes: Any) -> dict[str, Any]:
        block: dict[str, Any] = {
            "name": "openrlhf",
            "python": str(openrlhf_python),
            "env": openrlhf_env,
            "gpus": 1,
            "micro_batch": 8,
            "ray": {"num_gpus": 4, "num_cpus": 8, "object_store_mib": 300},
            "vllm": {"engines": 1, "gpu_memory": 0.1, "sync": "gloo", "eager": True},
            "deepspeed": {"zero_stage": 2, "attention": "eager"},
        }
        merged = {k: block[k] | v if isinstance(v, dict) and k in block else v for k, v in changes.items()}
        return block | merged

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 82k parameters in bfloat16, with a tokenizer of one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("openrlhf") / "tiny"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of sums of one-digit numbers, as the run config's ``data:`` block."""
    folder = tmp_path_factory.mktemp("prompts")
    sums = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(sums)
    files = {}
    for split, part in {"train": sums[:64], "validation": sums[64:80], "test": sums[80:]}.items():
        file = folder / f"{split}.jsonl"
        rows = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in part)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    return files
