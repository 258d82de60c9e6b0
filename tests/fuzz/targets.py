"""The files that are fuzzed: a real example of each kind, and the readers that a user's command would call."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.comparison.comparison_config import load_comparison
from next_core.config import load_config
from next_core.cycle.run_result import read_result
from next_core.report.geometry import GeometryOptions
from next_core.report.inputs import Recorded, open_folder
from next_core.report.write import write_report
from next_core.sources.adapter_files import AdapterFiles
from next_core.sources.hf_model import ModelFiles
from next_core.sources.jumps import jump_records
from next_core.sources.metrics import read_log, read_metrics
from next_core.sources.tensor_files import SafetensorsFile
from next_core.storage.atomic import seal
from next_core.storage.json_lines import json_line
from next_core.storage.manifest import check_contents, check_manifest
from tests.fuzz import mutations
from tests.report.made import arm, comparison
from tests.sources.models import adapter, adapter_tensors

Mutate = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of file: its path in the examples, how it is damaged, what reads it, its share of all cases."""

    file: str
    mutate: Mutate
    read: Callable[[Path], object]
    share: float


def run_config(folder: Path) -> None:
    load_config(folder / "run.yaml")


def compare_config(folder: Path) -> None:
    load_comparison(folder / "compare.yaml")


def weights(folder: Path) -> None:
    file = SafetensorsFile(folder / "plain" / "x.safetensors")
    for key in file.shapes:
        file.read(key)


def adapter_files(folder: Path) -> None:
    opened = AdapterFiles(folder / "plain")
    assert all(math.isfinite(scaling) for scaling in opened.scaling.values())
    for key in opened.file.shapes:
        opened.file.read(key)


def model_files(folder: Path) -> None:
    opened = ModelFiles(folder / "model")
    for key in opened.shapes:
        opened.read(key)


def sealed(folder: Path) -> None:
    check_manifest(folder / "run" / "checkpoints" / "step-20", contents=True)
    check_contents(folder / "run" / "checkpoints" / "step-20" / "adapter_model.safetensors")


def steps(folder: Path) -> None:
    source = open_checkpoints(folder / "run" / "checkpoints", skip_damaged=True)
    source.delta(source.parameters[0].name, source.steps[-1])


def log(folder: Path) -> None:
    read_log(folder / "run" / "metrics.jsonl")


def state(folder: Path) -> None:
    read_metrics({10: folder / "trainer" / "checkpoint-10"})


def recorded(folder: Path) -> None:
    run = Recorded(folder / "run")
    _ = run.predictor, run.backbone, run.started, run.last_step, [run.accuracy(way) for way in ("start", "final")]


def result(folder: Path) -> None:
    read_result(folder / "run")
    recorded(folder)


def compared(folder: Path) -> None:
    open_folder(folder / "compared")


def page(folder: Path) -> None:
    """Write whole pages."""
    for name in ("run", "compared"):
        write_report(folder / name, settings=GeometryOptions(wanted=False))


def jump(folder: Path) -> None:
    jump_records(folder / "run" / "jumps")


TARGETS = {
    "run-config": Target("run.yaml", mutations.of_yaml, run_config, 0.03),
    "compare-config": Target("compare.yaml", mutations.of_yaml, compare_config, 0.02),
    "safetensors": Target("plain/x.safetensors", mutations.of_safetensors, weights, 0.18),
    "adapter-weights": Target("plain/adapter_model.safetensors", mutations.of_safetensors, adapter_files, 0.1),
    "adapter-config": Target("plain/adapter_config.json", mutations.of_json, adapter_files, 0.1),
    "index": Target("model/model.safetensors.index.json", mutations.of_json, model_files, 0.12),
    "manifest": Target("run/checkpoints/step-20/manifest.json", mutations.of_checked, sealed, 0.08),
    "checkpoint": Target("run/checkpoints/step-20/adapter_model.safetensors", mutations.of_safetensors, steps, 0.04),
    "journal": Target("run/journal.jsonl", mutations.of_lines, recorded, 0.08),
    "metrics": Target("run/metrics.jsonl", mutations.of_lines, log, 0.05),
    "trainer-state": Target("trainer/checkpoint-10/trainer_state.json", mutations.of_json, state, 0.05),
    "result": Target("run/result.json", mutations.of_json, result, 0.05),
    "compare": Target("compared/compare.json", mutations.of_json, compared, 0.04),
    "page-of-run": Target("run/result.json", mutations.of_json, page, 0.0002),
    "page-of-journal": Target("run/journal.jsonl", mutations.of_lines, page, 0.0002),
    "page-of-compare": Target("compared/compare.json", mutations.of_json, page, 0.0002),
    "jump": Target("run/jumps/0001/jump.json", mutations.of_json, jump, 0.03),
    "undone": Target("run/jumps/0001/undone.json", mutations.of_json, jump, 0.03),
}


def write_examples(folder: Path) -> None:
    """Write a valid file of every kind."""
    (folder / "base").mkdir(parents=True)
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    examples = Path(__file__).parents[2]
    run: dict[str, Any] = yaml.safe_load((examples / "examples" / "quickstart.yaml").read_text())
    data = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    run["training"] |= {"model": "base", "data": data, "learning_rate": 1e-4}
    (folder / "run.yaml").write_text(json.dumps(run))
    arms = {"secant": {"predictor": "secant", "choose": {"schedule.alpha": [1, 2]}}, "auto": {"predictor": "auto"}}
    race = {
        "base": "run.yaml",
        "steps": 100,
        "longer": 150,
        "seeds": 2,
        "arms": arms,
        "run": {"schedule": {"alpha": 1}},
    }
    race |= {"tuned": {"training.learning_rate": [3e-4, 1e-3]}, "measure_every": 25}
    (folder / "compare.yaml").write_text(json.dumps(race))

    adapter(folder / "plain", 10)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": False, "target_modules": ["q_proj"]}
    config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*.q_proj": 4.0, "v_proj": 8}}
    (folder / "plain" / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.ones(2).int()},
        folder / "plain" / "x.safetensors",
    )
    (folder / "model").mkdir()
    for shard in "12":
        save_file({f"w{shard}": torch.ones(2, 2)}, folder / "model" / f"{shard}.safetensors")
    index = {"metadata": {"total_size": 32}, "weight_map": {"w1": "1.safetensors", "w2": "2.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    for step in (10, 20, 30):
        seal(adapter(folder / "run" / "checkpoints" / f"step-{step}", step))
    made = folder / "run" / "jumps" / "0001"
    made.mkdir(parents=True)
    (made / "jump.json").write_text('{"step": 10, "alpha": 1.5, "adapter": null}')
    (made / "undone.json").write_text('{"step": 15}')
    save_file({key: value * 0 for key, value in adapter_tensors(1).items()}, made / "shift.safetensors")
    secant = arm({0: 0.5}, {0: 0.4})
    jump = {"step": 10, "accepted": True, "reason": "fine", "alpha": 1.0, "diagnostics": {"x": 0.5}, "norm_ratio": 2.0}
    point = {"step": 0, "seconds": 0.5, "validation": {"sampled": 0.5}, "test": {"sampled": 0.5, "greedy": None}}
    records = [
        {"event": "start", "step": 0, "steps": 20, "seed": 0},
        {"event": "accuracy", "step": 0, "milestone": "start", "value": 0.2},
        {"event": "curve"} | point,
        {"event": "jump"} | jump,
        {"event": "verify", "step": 12, "jump_step": 10, "accepted": True, "reason": "recovered", "accuracy": 0.3},
        {"event": "resume", "step": 12},
        {"event": "end", "step": 20},
    ]
    (folder / "run" / "journal.jsonl").write_bytes(b"".join(map(json_line, records)))
    logged = [{"step": step, "reward": 0.1 * step, "loss": 1.0, "note": "x"} for step in range(1, 6)]
    (folder / "run" / "metrics.jsonl").write_bytes(b"".join(map(json_line, logged)))
    (folder / "run" / "config.yaml").write_text(json.dumps(run))
    result = {
        "steps": 20,
        "seconds": {"rl": 1.5},
        "accuracy": {"start": 0.2, "final": None},
        "jumps": [jump],
        "folder": "x",
    }
    result |= {"control": {"steps": 20, "seconds": 1.0, "accuracy": {"final": 0.3}, "curve": [point]}, "curve": [point]}
    result |= {"resumed_from": None, "settings": {"predictor": "secant"}, "notes": [], "average": None, "advice": None}
    (folder / "run" / "result.json").write_text(json.dumps(result))

    state = {"global_step": 10, "log_history": logged, "best_metric": None}
    (folder / "trainer" / "checkpoint-10").mkdir(parents=True)
    (folder / "trainer" / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "compared").mkdir()
    small = comparison(seeds=1) | {"arms": {"plain": arm({0: 0.4}, {0: 0.4}, role="plain"), "secant": secant}}
    (folder / "compared" / "compare.json").write_text(json.dumps(small))


def fresh(folder: Path) -> Path:
    """Write the examples into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    write_examples(folder)
    return folder
