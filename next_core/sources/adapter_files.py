"""One LoRA adapter in PEFT's format: the meaning of its factors from its config, and the file that stores them."""

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
from next_core.sources.tensor_files import TensorFile, is_unchanged, read_json
from next_core.storage.checkpoint_errors import damaged, other_model
from next_core.storage.reading import stamp
from next_core.types import Parameter

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = ADAPTER_FILES
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the first B A from the base weights."""
MOST_PATTERNS = 20_000
REPEATED_GROUP = re.compile(r"\)[*+{]")


class AdapterConfig:
    """The part of PEFT's ``adapter_config.json`` that determines what the factors mean."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path, verify=True)
        self._stamp = stamp(path)
        self._refuse_unsupported()
        self.rslora = bool(self.raw.get("use_rslora"))
        self._patterns = {key: self._compiled(key) for key in ("alpha_pattern", "rank_pattern")}

    def _refuse_unsupported(self) -> None:
        kind, start = self.raw.get("peft_type"), self.raw.get("init_lora_weights")
        if kind != "LORA":
            problem = f"peft_type is {kind!r}; only LORA adapters can be extrapolated"
        elif self.raw.get("use_dora"):
            problem = (
                "DoRA's delta is not low-rank (its magnitude vector rescales whole rows), so its factors cannot be "
                "extrapolated; train with use_dora=False, or extrapolate merged checkpoints"
            )
        elif isinstance(start, str) and start.startswith(CHANGES_BASE):
            problem = (
                f"init_lora_weights {start!r} changes the base weights, so B A is not what the model moved by; convert "
                "the adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        else:
            return
        raise CheckpointError(f"{self.path}: {problem}", kind="checkpoint-unsupported-adapter")

    def scaling(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA, with PEFT's per-module alpha pattern."""
        alpha = self._number(module, "lora_alpha", "alpha_pattern")
        return alpha / (rank**0.5 if self.rslora else rank)

    def rank(self, module: str) -> float:
        """Return the rank that the config declares for a module, per-module pattern included."""
        return self._number(module, "r", "rank_pattern")

    def unchanged(self) -> bool:
        """Return whether the file on disk is still the one that was read."""
        return is_unchanged(self.path, self._stamp)

    def _number(self, module: str, key: str, pattern: str) -> float:
        matching = (value for compiled, value in self._patterns[pattern] if compiled.match(module))
        value = next(matching, self.raw.get(key))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise damaged(self.path, f"gives no number for '{module}' in {key} and {pattern} ({value!r})")
        return float(value)

    def _compiled(self, key: str) -> list[tuple[re.Pattern[str], Any]]:
        """Return the regular expressions of a pattern as PEFT applies them: to the end of a module's name."""
        patterns = self.raw.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise damaged(self.path, f"has a {key} that does not map module names to numbers")
        compiled = []
        for name, value in patterns.items():
            # Python's matching backtracks: a hostile expression would take longer than anybody waits.
            repeats = sum(map(name.count, "*+?{"))
            if len(name) > 1000 or name.count("(") > 4 or repeats > 4 or REPEATED_GROUP.search(name):
                raise damaged(self.path, f"has too complex an expression in {key}: {reprlib.repr(name)}")
            try:
                compiled.append((re.compile(rf"(.*\.)?({name})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise damaged(
                    self.path, f"has an invalid expression in {key}: {reprlib.repr(name)} ({error})"
                ) from None
        return compiled


class AdapterFiles:
    """The adapter in a folder: its parameters and scalings, and the file its factors are read from.

    ``replacement`` may wrap the factors' file. Raises ``CheckpointError`` for an adapter that is damaged, of a kind
    whose delta is not ``scaling * B @ A``, or a pickle if these are not allowed.
    """

    def __init__(
        self,
        folder: Path,
        allow_pickle: bool = False,
        replacement: Callable[[TensorFile], TensorFile] = lambda file: file,
    ) -> None:
        self.folder = folder
        weights = folder / WEIGHTS_FILE
        if not os.path.lexists(weights) and (folder / PICKLE_FILE).exists():
            weights = folder / PICKLE_FILE
        self.file = replacement(open_tensors(weights, allow_pickle))
        self.config = AdapterConfig(folder / CONFIG_FILE)
        self.skipped: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        sides: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, shape in self.file.shapes.items():
            match = KEY.fullmatch(key)
            if match is None or len(shape) != 2:
                self.skipped[key] = "not a LoRA factor of a linear layer"
            elif not self.file.dtype(key).is_floating_point:
                raise damaged(self.file.path, f"stores '{key}' as {self.file.dtype(key)}")
            else:
                sides.setdefault(match["module"], {})[match["side"]] = shape
        if not sides:
            raise CheckpointError(
                f"{self.file.path} contains no LoRA factors; is it the adapter of this run?",
                kind="checkpoint-unsupported-adapter",
            )
        self.parameters = tuple(self._parameter(module, shapes) for module, shapes in sorted(sides.items()))

    def _parameter(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Parameter:
        if set(shapes) != {"A", "B"} or not shapes["A"][0] == shapes["B"][1] > 0:
            raise damaged(self.file.path, f"has factors of '{module}' that do not fit each other: {shapes}")
        rank, declared = shapes["A"][0], self.config.rank(module)
        if rank != declared:
            raise other_model(
                f"{self.file.path}: '{module}' has rank {rank} but {CONFIG_FILE} says {declared:g}; "
                "config and weights are of different runs"
            )
        if 0 in (shapes["B"][0], shapes["A"][1]):
            raise damaged(self.file.path, f"has a '{module}' without rows or columns")
        self.scaling[f"{module}.weight"] = self.config.scaling(module, rank)
        return Parameter(f"{module}.weight", (shapes["B"][0], shapes["A"][1]), rank)

    def unchanged(self) -> bool:
        """Return whether factors and config on disk are still those that were opened."""
        return self.file.unchanged() and self.config.unchanged()

    def weight_files(self) -> list[Path]:
        """Return the files that determine the weights."""
        return [*self.file.weight_files(), self.config.path]
