"""One LoRA adapter in PEFT's format: its config, and the file that stores its factors."""

import os
from pathlib import Path

from torch import Tensor

from next_core.errors import CheckpointError, not_found
from next_core.sources.adapter_config import AdapterConfig
from next_core.sources.adapter_tensors import FACTOR, AdapterModule, PlainFile, read_modules
from next_core.sources.fsdp_shards import ADAPTER_KEY, LORA, open_shards, shards_folder
from next_core.sources.layouts import ADAPTER_FILES, MODEL_FILES, has_any
from next_core.sources.tensor_files import Replacement, open_tensors
from next_core.types import LoraFactors

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = ADAPTER_FILES


class AdapterFiles:
    """The adapter in a folder: its parameters and scalings, and the file its factors are read from.

    ``replacement`` may wrap the factors' file. Raises ``CheckpointError`` for an adapter that is damaged, of a kind
    whose delta is not ``scaling * B @ A``, or a pickle if these are not allowed.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False, replacement: Replacement = lambda file: file) -> None:
        self.folder = folder
        lora = shards_folder(folder) / LORA
        if os.path.lexists(lora) and not has_any(folder, ADAPTER_FILES):
            whole = folder / MODEL_FILES[0]
            file = open_tensors(whole) if whole.exists() else open_shards(folder, allow_pickle)
            self.file = PlainFile(replacement(file), ADAPTER_KEY)
            targets = sorted({match["module"] for match in map(FACTOR.fullmatch, self.file.shapes) if match})
            self.config = AdapterConfig(lora, {"peft_type": "LORA", "target_modules": targets})
        else:
            weights = folder / WEIGHTS_FILE
            if not os.path.lexists(weights) and (folder / PICKLE_FILE).exists():
                weights = folder / PICKLE_FILE
            self.file = PlainFile(replacement(open_tensors(weights, allow_pickle)))
            self.config = AdapterConfig(folder / CONFIG_FILE)
        self.modules, self.skipped = read_modules(self.file, self.config)
        self._module_of = {p.name: module for module in self.modules.values() for p in module.parameters}
        self.parameters = tuple(p for module in self.modules.values() for p in module.parameters)
        if not self.parameters:
            raise CheckpointError(
                f"{self.file.path}: no factors of a linear layer, only of {next(iter(self.modules))}",
                kind="checkpoint-unsupported-adapter",
            )
        self.scaling = {name: module.scaling for name, module in self._module_of.items()}

    def module_of(self, parameter: str) -> AdapterModule:
        """Return the module that holds a parameter's factors. Raises ``CheckpointError`` for an unknown one."""
        if parameter not in self._module_of:
            raise not_found(f"{self.file.path} has no parameter '{parameter}'")
        return self._module_of[parameter]

    def read(self, module: AdapterModule) -> tuple[Tensor, Tensor]:
        """Return the tensors that hold a module's A and B."""
        return self.file.read(module.keys[0]), self.file.read(module.keys[1])

    def factors(self, parameter: str) -> LoraFactors:
        """Return a parameter's own factors."""
        module = self.module_of(parameter)
        return module.factors(parameter, self.read(module))

    def unchanged(self) -> bool:
        """Return whether factors and config on disk are still those that were opened."""
        return self.file.unchanged() and self.config.unchanged()

    def weight_files(self) -> list[Path]:
        """Return the files that determine the weights."""
        return [*self.file.weight_files(), self.config.path]
