"""One LoRA adapter in PEFT's format: what its config makes of its factors, and the factors' file."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError
from next_core.sources.layouts import ADAPTER_FILES
from next_core.sources.pickles import open_tensors
from next_core.sources.tensor_files import TensorFile, as_stamped, read_json, stamp
from next_core.types import Parameter

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = ADAPTER_FILES
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that subtract the first B A from the base weights."""
MOST_PATTERNS = 20_000
NESTED = re.compile(r"\)[*+{]")
"""A group that is repeated."""


class AdapterConfig:
    """The part of PEFT's ``adapter_config.json`` that decides what the factors mean."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path, verify=True)
        self.stamp = stamp(path)
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA adapters can be extrapolated")
        if self.raw.get("use_dora"):
            raise CheckpointError(
                f"{path}: DoRA's delta is not low-rank (its magnitude vector rescales whole rows), so its factors "
                "cannot be extrapolated; train with use_dora=False, or extrapolate merged checkpoints"
            )
        begin = self.raw.get("init_lora_weights")
        if isinstance(begin, str) and begin.startswith(CHANGES_BASE):
            raise CheckpointError(
                f"{path}: init_lora_weights {begin!r} changes the base weights, so B A is not what the model moved by; "
                "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        self.rslora = bool(self.raw.get("use_rslora"))
        self._patterns = {key: self._compiled(key) for key in ("alpha_pattern", "rank_pattern")}

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with PEFT's per-module alpha pattern."""
        alpha = self._number(module, "lora_alpha", "alpha_pattern")
        return alpha / (rank**0.5 if self.rslora else rank)

    def rank(self, module: str) -> float:
        """The rank the config declares for a module, per-module pattern included."""
        return self._number(module, "r", "rank_pattern")

    def _number(self, module: str, key: str, pattern: str) -> float:
        matched = (value for compiled, value in self._patterns[pattern] if compiled.match(module))
        value = next(matched, self.raw.get(key))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(
                f"{self.path}: {key} and {pattern} give no number for '{module}' ({value!r}); restore the file"
            )
        return float(value)

    def _compiled(self, key: str) -> list[tuple[re.Pattern[str], Any]]:
        """The regular expressions of one pattern, as PEFT applies them: to the end of a module's name."""
        found = self.raw.get(key) or {}
        if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
            raise CheckpointError(f"{self.path}: {key} does not map names of modules to numbers; restore the file")
        compiled = []
        for name, value in found.items():
            # Python's matching backtracks: an expression made for it would take longer than anybody waits.
            if len(name) > 1000 or name.count("(") > 4 or sum(map(name.count, "*+?{")) > 4 or NESTED.search(name):
                raise CheckpointError(f"{self.path}: {key} has too intricate an expression: {reprlib.repr(name)}")
            try:
                compiled.append((re.compile(rf"(.*\.)?({name})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(
                    f"{self.path}: {key} has no regular expression in {reprlib.repr(name)} ({error}); restore the file"
                ) from None
        return compiled


class AdapterFiles:
    """The adapter in a folder: its parameters and scalings, and the file its factors are read from.

    Raises ``CheckpointError`` for an adapter that is damaged, of a kind whose delta is not ``scaling * B @ A``, or a
    pickle where these are not allowed. ``through`` may stand something in the place of the factors' file.
    """

    def __init__(
        self, folder: Path, allow_pickle: bool = False, through: Callable[[TensorFile], TensorFile] = lambda file: file
    ) -> None:
        self.folder = folder
        weights = folder / WEIGHTS_FILE
        if not os.path.lexists(weights) and (folder / PICKLE_FILE).exists():
            weights = folder / PICKLE_FILE
        self.file = through(open_tensors(weights, allow_pickle))
        self.config = AdapterConfig(folder / CONFIG_FILE)
        self.skipped: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        sides: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, shape in self.file.shapes.items():
            match = KEY.fullmatch(key)
            if match is None or len(shape) != 2:
                self.skipped[key] = "not a LoRA factor of a linear layer"
            elif not self.file.dtype(key).is_floating_point:
                raise CheckpointError(f"{self.file.path}: '{key}' is stored as {self.file.dtype(key)}; restore it")
            else:
                sides.setdefault(match["module"], {})[match["side"]] = shape
        self.parameters = tuple(self._parameter(module, shapes) for module, shapes in sorted(sides.items()))
        if not self.parameters:
            raise CheckpointError(f"{self.file.path} holds no LoRA factors; is it the adapter of this run?")

    def _parameter(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Parameter:
        if set(shapes) != {"A", "B"} or not shapes["A"][0] == shapes["B"][1] > 0:
            raise CheckpointError(
                f"{self.file.path}: factors of '{module}' do not fit: {shapes}; restore the checkpoint"
            )
        rank, said = shapes["A"][0], self.config.rank(module)
        if rank != said:
            raise CheckpointError(
                f"{self.file.path}: '{module}' has rank {rank} but {CONFIG_FILE} says {said:g}; "
                "config and weights are of different runs"
            )
        if 0 in (shapes["B"][0], shapes["A"][1]):
            raise CheckpointError(f"{self.file.path}: '{module}' has no rows or no columns; restore the checkpoint")
        self.scaling[f"{module}.weight"] = self.config.scaling(module, rank)
        return Parameter(f"{module}.weight", (shapes["B"][0], shapes["A"][1]), rank)

    def unchanged(self) -> bool:
        """Whether factors and config on disk are still those that were opened."""
        return self.file.unchanged() and as_stamped(self.config.path, self.config.stamp)

    def settled_by(self) -> list[Path]:
        """The files that decide the weights."""
        return [*self.file.settled_by(), self.config.path]
