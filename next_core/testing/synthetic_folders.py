"""Tiny runs on disk for the checks, as trainers lay them out; nothing but safetensors and JSON is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from next_core.testing.synthetic_runs import SCALING, SyntheticRun, dense_run, lora_run
from next_core.types import LoraFactors


def write_lora_run(folder: str | Path, run: SyntheticRun | None = None, name: str = "checkpoint-{}") -> SyntheticRun:
    """Write PEFT adapters, one ``checkpoint-N`` for each kept step, with the trainer's log. Returns what was written.

    Every factor of ``run`` has to have the same rank and ``SCALING``, as those of ``lora_run``.
    """
    run, folder = run or lora_run(), Path(folder)
    for step, at in run.weights.items():
        tensors: dict[str, Tensor] = {}
        rank = 0
        for parameter, value in at.items():
            assert isinstance(value, LoraFactors)
            rank = value.A.shape[0]
            module = parameter.removesuffix(".weight")
            for side, tensor in (("A", value.A), ("B", value.B)):
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor.contiguous()
        modules = sorted({parameter.removesuffix(".weight").rpartition(".")[2] for parameter in at})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": int(SCALING * rank)}
        target = _new(folder / name.format(step))
        _write_json(target / "adapter_config.json", config | {"target_modules": modules})
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_log(target, run, step)
    return run


def write_model_run(folder: str | Path, run: SyntheticRun | None = None, name: str = "checkpoint-{}") -> SyntheticRun:
    """Write full models, one ``checkpoint-N`` for each kept step, and the base model in ``folder.parent / "base"``."""
    run, folder = run or dense_run(), Path(folder)
    write_base(folder.parent / "base", run)
    for step, at in run.weights.items():
        target = _new(folder / name.format(step))
        _write_model(target, {parameter: value for parameter, value in at.items() if isinstance(value, Tensor)})
        _write_log(target, run, step)
    return run


def write_base(folder: str | Path, run: SyntheticRun | None = None) -> dict[str, Tensor]:
    """Write a base model with the matrices of the synthetic runs. Returns them."""
    run = run or dense_run()
    matrices = {name.removeprefix("backbone/"): v for name, v in run.tensors().items() if name.startswith("backbone/")}
    _write_model(_new(Path(folder)), matrices)
    return matrices


def _write_model(folder: Path, matrices: Mapping[str, Tensor]) -> None:
    _write_json(folder / "config.json", {"model_type": "llama", "tie_word_embeddings": False})
    save_file({k: v.contiguous() for k, v in matrices.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def _write_log(folder: Path, run: SyntheticRun, step: int) -> None:
    logged = [{"step": at, **run.metrics(at)} for at in run.steps if at <= step]
    _write_json(folder / "trainer_state.json", {"global_step": step, "log_history": logged})


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")
