"""What a run leaves that must not depend on how often it was killed, as values that can be compared."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from next_core.cycle.journal import counted_records, read_journal
from next_core.sources.metrics import by_step, read_log

CLOCK = frozenset(
    {"date", "seconds", "next_core/seconds", "step_time", "train_runtime"}
    | {"train_samples_per_second", "train_steps_per_second"}
)
"""Measured by the clock: runs before and after midnight have other dates."""
OF_THE_PROCESS = frozenset({"folder", "resumed_from", "train_loss", "total_flos"})
"""Where it ran, and what the trainer sums up at its end over the steps of this process."""

NOT_COMPARED = frozenset({"manifest.json", "training_args.bin", "README.md"})
"""Hashes of what is compared here and of times, the folder's name, and the trainer's card, which it adds to."""


def facts(out: Path) -> dict[str, Any]:
    """By file, and for the journal by record: what a run in ``out`` came to. Tensors are told by the sha256 of them."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".safetensors":
            found[name] = _plain(load_file(path))
        elif path.suffix in (".pt", ".pth"):
            found[name] = _plain(torch.load(path, weights_only=False))
        elif path.name == "journal.jsonl":
            records = [r for r in counted_records(read_journal(path)) if r["event"] != "resume"]
            found |= {f"{name} {i} {r['event']} {r['step']}": _plain(r) for i, r in enumerate(records)}
        elif path.name == "metrics.jsonl":
            found |= {f"{name} {step}": _plain(numbers) for step, numbers in by_step(read_log(path)).items()}
        elif path.name in ("result.json", "trainer_state.json"):
            found[name] = _plain(json.loads(path.read_text()))
        elif path.name in NOT_COMPARED:
            found[name] = None
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two runs differ; nothing for equal ones."""
    return [name for name in sorted({*one, *other}) if one.get(name, "not there") != other.get(name, "not there")]


def _plain(value: Any) -> Any:
    """Comparable by ``==``, bit for bit, without what a clock has measured."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if key not in CLOCK | OF_THE_PROCESS}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)
