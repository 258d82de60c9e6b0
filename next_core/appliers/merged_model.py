"""The prediction as a Hugging Face model folder: backbone, trained delta and jump in one, streamed shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from next_core.appliers.displacement import displacement, merged
from next_core.appliers.folder import WrittenFolder, checked_target
from next_core.errors import ConfigError, GuardError
from next_core.interfaces import CheckpointSource, PluginConfig, Prediction, WeightApplier
from next_core.lowrank import dense
from next_core.sources.full_model import FullModelSource
from next_core.sources.hf_model import ModelFiles
from next_core.sources.peft_adapter import PeftAdapterSource
from next_core.storage import new_directory

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


class MergedModelConfig(PluginConfig):
    backbone: Path | None = Field(None, description="The base model's folder; default: the one the run was opened with")


class MergedModelApplier(WeightApplier):
    """W_0 + (W_T - W_0) + alpha * jump, computed in fp32 and stored in the backbone's own precision."""

    name = "merged-model"
    config_class = MergedModelConfig

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: str | Path) -> WrittenFolder:
        backbone = self.config.backbone or getattr(prediction.source.config, "backbone", None)
        if backbone is None:
            raise ConfigError("the applier 'merged-model' needs the base model; pass --backbone FOLDER")
        target = checked_target(prediction, out, backbone)
        self._refuse_loss(prediction)
        files = ModelFiles(backbone)
        files.require({parameter.name: parameter.shape for parameter in prediction.source.parameters})
        with new_directory(target) as folder:
            for path in sorted(Path(backbone).iterdir()):
                if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
                    shutil.copyfile(path, folder / path.name)
            for file in files.files:
                self._write_shard(prediction, alpha, file.path, folder / file.path.name)
        return WrittenFolder(target)

    def _refuse_loss(self, prediction: Prediction) -> None:
        """Whatever else was trained has to be in a merged model too."""
        source = prediction.source
        if not isinstance(source, PeftAdapterSource):
            return
        if source.skipped:
            raise ConfigError(
                f"the run trains more than LoRA factors of linear layers ('{next(iter(source.skipped))}'), which a "
                "merged model would lose; use the applier 'peft-adapter'"
            )
        if source.adapter_config().get("fan_in_fan_out"):
            raise ConfigError("the adapter is of transposed layers (fan_in_fan_out); use the applier 'peft-adapter'")

    def _write_shard(self, prediction: Prediction, alpha: float, source: Path, target: Path) -> None:
        trained = {parameter.name for parameter in prediction.source.parameters} | set(self._others(prediction.source))
        tensors: dict[str, Tensor] = {}
        with safe_open(source, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                value = shard.get_tensor(key)
                tensors[key] = self._extended(prediction, alpha, key, value) if key in trained else value
        save_file(tensors, target, metadata={"format": "pt"})

    def _others(self, source: CheckpointSource) -> Iterable[str]:
        """What a full-parameter run trains besides matrices: norms and biases, which stay as trained."""
        return source.skipped if isinstance(source, FullModelSource) else ()

    def _extended(self, prediction: Prediction, alpha: float, name: str, value: Tensor) -> Tensor:
        source, step = prediction.source, prediction.step
        if isinstance(source, FullModelSource):
            total = source.weight(name, step).double()
        else:
            total = value.double() + dense(source.position(name, step))
        moved = displacement(prediction, name, alpha)
        if moved is not None:
            total = total + dense(merged(moved))
        result = total.to(value.dtype)
        if not bool(torch.isfinite(result).all()):
            raise GuardError(f"'{name}' overflows {value.dtype} after the jump; nothing was written")
        return result
