"""The former place of names that now have files of their own."""

from __future__ import annotations

from next_core.sources.cache import TensorCache
from next_core.sources.files import SafetensorsFile, read_json
from next_core.sources.jumps import (
    CHECKPOINTS,
    JUMP_RECORD,
    JUMPS,
    SHIFT_FILE,
    UNDONE,
    Shift,
    Shifts,
    jump_folders,
    jump_records,
)
from next_core.sources.layouts import LAYOUTS
from next_core.sources.metrics import METRICS, metrics_at, read_metrics

__all__ = [
    "CHECKPOINTS",
    "JUMPS",
    "JUMP_RECORD",
    "LAYOUTS",
    "METRICS",
    "SHIFT_FILE",
    "UNDONE",
    "SafetensorsFile",
    "Shift",
    "Shifts",
    "TensorCache",
    "jump_folders",
    "jump_records",
    "metrics_at",
    "read_json",
    "read_metrics",
]
