"""Stages: a jump written out, of a whole bf16 checkpoint and as a LoRA adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.speed import synthetic
from benchmarks.speed.clock import apart, best_of, cold, cost_of, peak_of
from benchmarks.speed.machine import available_gib
from benchmarks.speed.stage import Options, Result, Row, stage
from benchmarks.speed.synthetic import HORIZON, LoraRun

EARLIER, NEWEST = 100, 150
ALPHA = 1.5
BETA = 1 + ALPHA * HORIZON / NEWEST
"""The jump is W_0 + BETA (W_T - W_0)."""
SHARE_OF_MEMORY = 0.7
"""What the naive way may take of the memory that is available; beyond it, it is run on a part of the tensors."""


@stage("jump-1.5B")
def jump_15b(options: Options) -> Result:
    """The line from the backbone through the newest checkpoint, continued; a full bf16 model read and written."""
    shapes = synthetic.TOY if options.toy else synthetic.QWEN_15B
    size = synthetic.model_bytes(shapes)
    with options.folder() as folder:
        synthetic.need_disk(folder, 4 * size)
        synthetic.write_backbone(folder / "base", shapes)
        for step in (EARLIER, NEWEST):
            synthetic.write_model(folder / "checkpoints" / f"checkpoint-{step}", shapes, step)
        others = [_mergekit(options.mergekit, folder)] if options.mergekit else []
        ways = {whole: apart(measure_jump, folder, whole, fresh=not options.toy) for whole in (True, False)}
        part = 1.0 if options.toy else _affordable_part(size)
        naive, naive_memory = apart(measure_naive_jump, folder, part, fresh=not options.toy)
    rows = []
    for whole, (measured, memory) in ways.items():
        what = "open, History, secant, merged-model" if whole else "open, coefficients given, merged-model"
        row: Row = {"what": f"a linear jump of a full bf16 checkpoint: {what}"} | measured | memory
        row |= {"target_cpu_s": 1.5, "target_gib": 0.35}
        # The line has two ends: the backbone and the newest checkpoint are read, the jump is written.
        row["floor"] = options.rates.floor(row["cpu_s"], "fp32", 0.0, 3.0 * size)
        row["reference"] = {"what": "load both state dicts in fp32, add, save"} | naive | naive_memory
        if whole:
            row["others"] = [other | {"ours_cpu_s": row["cpu_s"]} for other in others]
        rows.append(row)
    setting = {"model_gb": round(size / 1e9, 3), "checkpoints": [EARLIER, NEWEST], "horizon": HORIZON, "alpha": ALPHA}
    return Result(setting, rows)


def measure_jump(folder: Path, whole: bool) -> dict[str, Any]:
    """From folders to a folder: by way of a history and a predictor, or with the line's coefficients given."""
    from next_core import make_applier

    warm_up = folder / f"warm-up-{whole}"
    synthetic.write_backbone(warm_up / "base", synthetic.TOY)
    for step in (EARLIER, NEWEST):
        synthetic.write_model(warm_up / "checkpoints" / f"checkpoint-{step}", synthetic.TOY, step)
    places = iter(range(4))

    def jump(run: Path) -> Path:
        out = folder / f"jumped-{whole}-{next(places)}"
        make_applier("merged-model").apply(_predicted(run) if whole else _given(run), ALPHA, out=out)
        return out

    jump(warm_up)
    runs = []
    for _ in range(2):
        row, out = best_of(1, lambda: jump(folder))
        runs.append(row | {"errors": {"elements_unlike": _unlike(folder, out / "model.safetensors")}})
        shutil.rmtree(out)
    best = min(runs, key=lambda row: float(row["cpu_s"]))
    more = {"cold": cold(folder, lambda: jump(folder), best)} if whole else {}
    return best | {"runs_cpu_s": [row["cpu_s"] for row in runs]} | more


def _mergekit(python: str, folder: Path) -> dict[str, Any]:
    """The same jump by mergekit's task_arithmetic."""
    script, out = Path(__file__).with_name("task_arithmetic.py"), folder / "mergekit"
    printed, memory = peak_of([python, *map(str, (script, _base(folder), _newest(folder), BETA, out))])
    facts = json.loads(printed.splitlines()[-1])
    unlike = _unlike(folder, Path(facts["files"][0]))
    shutil.rmtree(out)
    what = f"mergekit {facts['version']}, task_arithmetic"
    seconds = {key: float(f"{facts[key]:.4g}") for key in ("cpu_s", "wall_s")}
    return {"what": what, **seconds, "own_gib": memory, "elements_unlike": unlike}


def _predicted(run: Path) -> Any:
    from next_core import History, make_predictor, open_checkpoints

    history = History(open_checkpoints(run / "checkpoints", run / "base"))
    return make_predictor("secant", anchor="backbone", space="merged").fit(history).predict(HORIZON)


def _given(run: Path) -> Any:
    """What ``_predicted`` gives, without looking at the deltas: every matrix is taken to have moved."""
    from next_core import CoefficientUpdate, Prediction, open_checkpoints

    source = open_checkpoints(run / "checkpoints", run / "base")
    update = CoefficientUpdate({NEWEST: 1 + HORIZON / NEWEST})
    updates = {parameter.name: update for parameter in source.parameters}
    return Prediction(source, NEWEST, HORIZON, "backbone", updates)


def _unlike(folder: Path, jumped: Path) -> float:
    """The share of elements that are not what W_0 + beta (W_T - W_0) gives in fp64, rounded to bf16.

    Of the first rows of one matrix: the check must take less memory than what it checks.
    """
    name = "model.layers.0.mlp.up_proj.weight"
    before, newest, after = (
        _read(path, [name])[name][:256].double() for path in (_base(folder), _newest(folder), jumped)
    )
    return float((after != (before + BETA * (newest - before)).bfloat16()).double().mean())


def _affordable_part(size: int) -> float:
    """Two fp32 state dicts are four times a bf16 model, the result is one."""
    return min(1.0, SHARE_OF_MEMORY * available_gib() * 2**30 / (5 * size))


def measure_naive_jump(folder: Path, part: float) -> dict[str, Any]:
    """W_0 + beta (W_T - W_0) over whole state dicts; on the first tensors that make up ``part``, and scaled up."""
    checkpoint = _newest(folder)
    keys = _first_part(checkpoint, part)

    def jump() -> None:
        before, newest = ({k: v.float() for k, v in _read(path, keys).items()} for path in (_base(folder), checkpoint))
        jumped = {key: (before[key] + BETA * (newest[key] - before[key])).bfloat16() for key in keys}
        save_file(jumped, folder / "naive.safetensors")

    cost, _ = cost_of(jump)
    (folder / "naive.safetensors").unlink()
    return _scaled(cost.cpu, cost.wall, _share(checkpoint, keys))


@stage("write-adapter")
def write_adapter(options: Options) -> Result:
    """A rank-1 jump beside a rank-64 adapter of Qwen2.5-1.5B: an adapter of rank 65, exact."""
    run = LoraRun(synthetic.QWEN_15B, steps=(EARLIER, NEWEST))
    if options.toy:
        run = replace(run, shapes=synthetic.TOY, rank=4)
    size = synthetic.model_bytes(run.shapes)
    with options.folder() as folder:
        run.write(folder / "checkpoints")
        measured, memory = apart(measure_adapter, folder, fresh=not options.toy)
        synthetic.need_disk(folder, 2 * size)
        synthetic.write_backbone(folder / "base", run.shapes)
        naive, naive_memory = apart(measure_naive_merge, folder, fresh=not options.toy)
    one = run.factor_bytes / len(run.steps)
    row: Row = {"what": f"peft-adapter: rank {run.rank} and a rank-1 jump, written as rank {run.rank + 1}"}
    row |= measured | memory | {"target_cpu_s": 0.1}
    row["floor"] = options.rates.floor(row["cpu_s"], "fp32", 0.0, one * (2 + 1 / run.rank))
    row["reference"] = {"what": "load the bf16 backbone, add s B A and the jump in fp32, save"} | naive | naive_memory
    setting = {"matrices": len(run.shapes.matrices()), "rank": run.rank, "adapter_gb": round(one / 1e9, 3)}
    return Result(setting | {"model_gb": round(size / 1e9, 3)}, [row])


def measure_adapter(folder: Path) -> dict[str, Any]:
    """Opening, reading the newest adapter, and writing the new one."""
    from next_core import make_applier

    warm_up = LoraRun(synthetic.TOY, rank=4, steps=(EARLIER, NEWEST)).write(folder / "warm-up")
    make_applier("peft-adapter").apply(_rank_one(warm_up), ALPHA, out=folder / "warm-up-out")
    places = iter(range(3))

    def write() -> None:
        make_applier("peft-adapter").apply(_rank_one(folder / "checkpoints"), ALPHA, out=folder / f"out-{next(places)}")

    row = best_of(3, write)[0]
    for again in range(3):
        shutil.rmtree(folder / f"out-{again}")
    return row


def _rank_one(checkpoints: Path) -> Any:
    """A prediction that moves every matrix by a rank-1 update."""
    from next_core import LowRank, LowRankUpdate, Prediction, open_checkpoints

    source = open_checkpoints(checkpoints)
    updates = {}
    for parameter in source.parameters:
        m, n = parameter.shape
        updates[parameter.name] = LowRankUpdate(LowRank(torch.full((m, 1), 1e-3), torch.ones(1, n)))
    return Prediction(source, NEWEST, HORIZON, "newest", updates)


def measure_naive_merge(folder: Path) -> dict[str, Any]:
    """A merged model the plain way; each weight in fp32 while it is added to, the model in bf16."""
    adapter = load_file(folder / "checkpoints" / f"checkpoint-{NEWEST}" / "adapter_model.safetensors")

    def merge() -> None:
        weights = load_file(_base(folder))
        for key in [key for key in adapter if ".lora_A." in key]:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            A, B = adapter[key], adapter[key.replace("lora_A", "lora_B")]
            moved = weights[name].float().addmm_(B, A, alpha=2.0)
            weights[name] = (moved + ALPHA * 1e-3).bfloat16()
        save_file(weights, folder / "naive.safetensors")

    cost, _ = cost_of(merge)
    (folder / "naive.safetensors").unlink()
    return _scaled(cost.cpu, cost.wall, 1.0)


def _base(folder: Path) -> Path:
    return folder / "base" / "model.safetensors"


def _newest(folder: Path) -> Path:
    return folder / "checkpoints" / f"checkpoint-{NEWEST}" / "model.safetensors"


def _read(path: Path, keys: list[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in keys}


def _first_part(path: Path, part: float) -> list[str]:
    """Names of the largest tensors first, until they make up ``part`` of the file."""
    sizes = _sizes(path)
    keys: list[str] = []
    taken, total = 0, sum(sizes.values())
    for key, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if keys and taken + size > part * total:
            continue
        keys.append(key)
        taken += size
    return keys


def _share(path: Path, keys: list[str]) -> float:
    sizes = _sizes(path)
    return sum(sizes[key] for key in keys) / sum(sizes.values())


def _sizes(path: Path) -> dict[str, int]:
    with safe_open(path, framework="pt") as file:
        return {key: torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys()}  # noqa: SIM118


def _scaled(cpu: float, wall: float, share: float) -> dict[str, Any]:
    how = "measured once" if share > 0.999 else f"estimated from {100 * share:.0f}% of the bytes, measured once"
    return {"cpu_s": float(f"{cpu / share:.4g}"), "wall_s": float(f"{wall / share:.4g}"), "how": how}
