"""The files that are fuzzed: a real example of each kind, and the readers that a user's command would call."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
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
from tests.sources.fsdp import save_shards
from tests.sources.models import adapter, adapter_tensors

Mutate = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of file: its path in the examples, how it is damaged, what reads it, its share of all cases."""

    file: str
    mutate: Mutate
    read: Callable[[Path], object]
    share: float


def weights(file: Path) -> None:
    opened = SafetensorsFile(file)
    for key in opened.shapes:
        opened.read(key)


def adapter_files(file: Path) -> None:
    opened = AdapterFiles(file.parent)
    assert all(math.isfinite(scaling) for scaling in opened.scaling.values())
    for key in opened.file.shapes:
        opened.file.read(key)


def model_files(file: Path) -> None:
    opened = ModelFiles(file.parent, allow_pickle=True)
    for key in opened.shapes:
        opened.read(key)


def sealed(file: Path) -> None:
    check_manifest(file.parent, contents=True)
    check_contents(file.parent / "adapter_model.safetensors")


def steps(file: Path) -> None:
    source = open_checkpoints(file.parents[1], skip_damaged=True)
    source.delta(source.parameters[0].name, source.steps[-1])


def recorded(file: Path) -> None:
    run = Recorded(file.parent)
    _ = run.predictor, run.backbone, run.started, run.last_step, run.title, run.rollouts, run.probes, run.control


def result(file: Path) -> None:
    read_result(file.parent)
    recorded(file)


def page(file: Path) -> None:
    """Write a whole page."""
    write_report(file.parent, settings=GeometryOptions(wanted=False))


def jumps(file: Path) -> None:
    jump_records(file.parents[1])


TARGETS = {
    "run-config": Target("run.yaml", mutations.of_json, load_config, 0.03),
    "compare-config": Target("compare.yaml", mutations.of_json, load_comparison, 0.02),
    "safetensors": Target("plain/x.safetensors", mutations.of_safetensors, weights, 0.18),
    "adapter-weights": Target("plain/adapter_model.safetensors", mutations.of_safetensors, adapter_files, 0.1),
    "adapter-config": Target("plain/adapter_config.json", mutations.of_json, adapter_files, 0.1),
    "index": Target("model/model.safetensors.index.json", mutations.of_json, model_files, 0.12),
    "fsdp-shard": Target("sharded/model_world_size_2_rank_1.pt", mutations.of_bytes, model_files, 0.02),
    "distributed": Target("dcp/.metadata", mutations.of_bytes, model_files, 0.02),
    "manifest": Target("run/checkpoints/step-20/manifest.json", mutations.of_checked, sealed, 0.08),
    "checkpoint": Target("run/checkpoints/step-20/adapter_model.safetensors", mutations.of_safetensors, steps, 0.04),
    "journal": Target("run/journal.jsonl", mutations.of_lines, recorded, 0.08),
    "metrics": Target("run/metrics.jsonl", mutations.of_lines, read_log, 0.05),
    "trainer-state": Target(
        "trainer/trainer_state.json", mutations.of_json, lambda f: read_metrics({10: f.parent}), 0.05
    ),
    "result": Target("run/result.json", mutations.of_json, result, 0.05),
    "compare": Target("compared/compare.json", mutations.of_json, lambda f: open_folder(f.parent), 0.04),
    "page-of-run": Target("run/result.json", mutations.of_json, page, 0.0002),
    "page-of-journal": Target("run/journal.jsonl", mutations.of_lines, page, 0.0002),
    "page-of-compare": Target("compared/compare.json", mutations.of_json, page, 0.0002),
    "jump": Target("run/jumps/0001/jump.json", mutations.of_json, jumps, 0.03),
    "undone": Target("run/jumps/0001/undone.json", mutations.of_json, jumps, 0.03),
}


def write_examples(folder: Path) -> Path:
    """Write a valid file of every kind into a new folder. Returns it."""
    (folder / "base").mkdir(parents=True)
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    quickstart = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
    run: dict[str, Any] = yaml.safe_load(quickstart.read_text())
    data = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    run["training"] |= {"model": "base", "data": data, "learning_rate": 1e-4}
    arms = {"secant": {"predictor": "secant", "choose": {"schedule.alpha": [1, 2]}}, "auto": {"predictor": "auto"}}
    race = {"base": "run.yaml", "steps": 100, "longer": 150, "seeds": 2, "arms": arms, "measure_every": 25}
    race |= {"tuned": {"training.learning_rate": [3e-4, 1e-3]}, "run": {"schedule": {"alpha": 1}}}
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": False, "target_modules": ["q_proj"]}
    lora |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*.q_proj": 4.0, "v_proj": 8}}
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
    logged = [{"step": step, "reward": 0.1 * step, "loss": 1.0, "note": "x"} for step in range(1, 6)]
    control = {"steps": 20, "seconds": 1.0, "accuracy": {"final": 0.3}, "curve": [point]}
    result = {"steps": 20, "seconds": {"rl": 1.5}, "accuracy": {"start": 0.2, "final": None}, "jumps": [jump]}
    result |= {"control": control, "curve": [point], "resumed_from": None, "settings": {"predictor": "secant"}}
    result |= {"folder": "x", "notes": [], "average": None, "advice": None}
    compared = {"plain": arm({0: 0.4}, {0: 0.4}, role="plain"), "secant": arm({0: 0.5}, {0: 0.4})}

    for step in (10, 20, 30):
        seal(adapter(folder / "run" / "checkpoints" / f"step-{step}", step))
    adapter(folder / "plain", 10)
    objects: dict[str, Any] = {
        "run.yaml": run,
        "compare.yaml": race,
        "plain/adapter_config.json": lora,
        "model/model.safetensors.index.json": {
            "metadata": {"total_size": 32},
            "weight_map": {"w1": "1.safetensors", "w2": "2.safetensors"},
        },
        "run/config.yaml": run,
        "run/result.json": result,
        "run/jumps/0001/jump.json": {"step": 10, "alpha": 1.5, "adapter": None},
        "run/jumps/0001/undone.json": {"step": 15},
        "trainer/trainer_state.json": {"global_step": 10, "log_history": logged, "best_metric": None},
        "compared/compare.json": comparison(seeds=1) | {"arms": compared},
    }
    for file, value in objects.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(value))
    (folder / "run" / "journal.jsonl").write_bytes(b"".join(map(json_line, records)))
    (folder / "run" / "metrics.jsonl").write_bytes(b"".join(map(json_line, logged)))
    several = {"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.ones(2).int()}
    save_file(several, folder / "plain" / "x.safetensors")
    save_shards(folder / "sharded", {"w": torch.ones(5, 2), "b": torch.ones(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process saves alone
        dcp.save({"model": {"w": torch.ones(5, 2), "b": torch.ones(3)}}, checkpoint_id=folder / "dcp", no_dist=True)
    for shard in "12":
        save_file({f"w{shard}": torch.ones(2, 2)}, folder / "model" / f"{shard}.safetensors")
    shift = {key: value * 0 for key, value in adapter_tensors(1).items()}
    save_file(shift, folder / "run" / "jumps" / "0001" / "shift.safetensors")
    return folder
