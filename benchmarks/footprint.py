"""What watching and jumping cost next to training, by model size: bytes on disk, memory, seconds per step.

    python benchmarks/footprint.py [--scratch DIR]    # writes benchmarks/results/footprint.json and prints its tables
    python benchmarks/footprint.py table              # prints them again

Models are Qwen2.5's shapes. A LoRA run has real adapters on a base that holds no numbers; a full-parameter run has some
of the 0.5B model's layers. AdamW steps along fixed random gradients, since the cost depends on shapes alone. Each case
runs in a process of its own; its memory is the most that it ever held, less that of the same steps without next-core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.clock import apart  # noqa: E402
from benchmarks.speed.synthetic import QWEN_05B, QWEN_7B, QWEN_15B, Shapes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "footprint.json"
STEPS, SAVE_EVERY, SAVES_KEPT = 40, 20, 2
RANK = 16
SECANT = {"observe": 20, "every": 5, "horizon": 10, "jump_every": 10}
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (None, {}),
    "auto": ("step-scale", {"every": 5, "average": 80}),
    "secant, keep all": ({"name": "secant", "window": 10}, SECANT | {"keep": "all"}),
    "secant, keep needed": ({"name": "secant", "window": 10}, SECANT | {"keep": "needed"}),
}
MODELS: dict[str, tuple[Shapes, bool]] = {
    "0.5B, LoRA r16": (QWEN_05B, True),
    "1.5B, LoRA r16": (QWEN_15B, True),
    "7B, LoRA r16": (QWEN_7B, True),
    "0.5B, 2 of 24 layers, full": (replace(QWEN_05B, layers=2), False),
    "0.5B, 4 of 24 layers, full": (replace(QWEN_05B, layers=4), False),
}


def make_model(shapes: Shapes, lora: bool) -> nn.Module:
    """Return linear layers of these shapes; with ``lora`` without numbers, under adapters that have them."""
    model = nn.Module()
    for name, (rows, columns) in shapes.matrices().items():
        *path, last = name.removesuffix(".weight").split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        device = "meta" if lora else "cpu"
        parent.add_module(last, nn.Linear(columns, rows, bias=False, device=device))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    targets = sorted({name.split(".")[-2] for name in shapes.matrices()})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    for name, module in model.named_modules():
        if ".lora_A." in name or ".lora_B." in name:
            module.to_empty(device="cpu")
            nn.init.normal_(module.weight, std=0.02 if ".lora_A." in name else 0.0)
    return model


def watch(shapes: Shapes, lora: bool, mode: str, folder: Path) -> dict[str, float]:
    """Take the steps of one case. Returns bytes on disk, and the training thread's seconds apart from its steps."""
    from next_backends.trl.trl_backend import TrlBackend
    from next_core.cycle.journal import Journal
    from next_core.cycle.loop import PredictExtendCycle
    from next_core.plugins import resolve_any_predictor
    from next_core.run_config import Guards, Schedule

    torch.manual_seed(0)
    model = make_model(shapes, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    predictor, schedule = MODES[mode]
    cycle, backend, run, output = None, TrlBackend(), folder / "next-core", folder / "trainer"
    if predictor is not None:
        args = SimpleNamespace(output_dir=str(output), gradient_accumulation_steps=1)
        backend.attach(model, run)
        backend.connect(optimizer, args)
        guards, made = Guards(probe=False, max_norm_ratio=None), resolve_any_predictor(predictor)
        cycle = PredictExtendCycle(backend, made, Schedule(**schedule), guards, STEPS, Journal())
        backend.begin(0, output)
    blocking, worst, most = 0.0, 0.0, 0
    for step in range(1, STEPS + 1):
        optimizer.step()
        begun = time.thread_time()
        if cycle is not None:
            cycle.after_step(step)
        if step % SAVE_EVERY == 0:
            save(output / f"checkpoint-{step}", trained, optimizer)
            if cycle is not None:
                backend.saved(output / f"checkpoint-{step}")
        spent = time.thread_time() - begun
        blocking, worst = blocking + spent, max(worst, spent)
        most = max(most, size(run))
    backend.finish()
    return {
        "trained": sum(parameter.nbytes for parameter in trained),
        "blocking_ms": 1e3 * blocking / STEPS,
        "worst_ms": 1e3 * worst,
        "history": size(run / "checkpoints") + size(run / "jumps"),
        "most": max(most, size(run)),
        "a_save": size(output / f"checkpoint-{STEPS}"),
        "saves": size(output),
    }


def save(folder: Path, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write what a trainer's checkpoint holds of these weights, and keep the newest few."""
    folder.mkdir(parents=True)
    torch.save([parameter.detach() for parameter in trained], folder / "model.pt")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    for old in sorted(folder.parent.iterdir())[:-SAVES_KEPT]:
        shutil.rmtree(old)


def size(folder: Path) -> int:
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # of a checkpoint that is being renamed
                total += (Path(path) / name).stat().st_size
    return total


def measure(shapes: Shapes, lora: bool, scratch: Path, fresh: bool = True) -> dict[str, dict[str, float]]:
    """Run all modes of one model. Memory is that above the plain mode's."""
    rows: dict[str, dict[str, float]] = {}
    for mode in MODES:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            row, memory = apart(watch, shapes, lora, mode, Path(folder), fresh=fresh)
        rows[mode] = row | {"memory_gib": memory.get("own_gib", 0.0)}
    plain = rows["plain"]["memory_gib"]
    for row in rows.values():
        row["added_gib"] = round(row["memory_gib"] - plain, 3)
    return rows


def table(facts: dict[str, Any]) -> str:
    """Return the committed figures as a table."""
    lines = [
        "| model | predictor | trained, MB | history, MB | most at a time, MB | added to a trainer's checkpoint | "
        "memory added, MB | ms per step (worst) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in facts["models"].items():
        for mode, row in rows.items():
            if mode == "plain":
                continue
            extra = row["a_save"] / rows["plain"]["a_save"] - 1
            lines.append(
                f"| {model} | {mode} | {row['trained'] / 1e6:.0f} | {row['history'] / 1e6:,.0f} | "
                f"{row['most'] / 1e6:,.0f} | {extra:+.0%} | {row['added_gib'] * 2**30 / 1e6:,.0f} | "
                f"{row['blocking_ms']:.1f} ({row['worst_ms']:,.0f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    from benchmarks.speed.machine import hardware

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "table"], default="all")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="8 GB are written here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    for name, (shapes, lora) in MODELS.items() if arguments.what == "all" else ():
        facts["models"][name] = measure(shapes, lora, arguments.scratch)
        facts["hardware"] = f"{hardware()}, one thread"
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts))


if __name__ == "__main__":
    main()
