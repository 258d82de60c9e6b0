"""The prediction as a LoRA adapter on disk, which plain PEFT (and vLLM) loads; no base weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from next_core.appliers.displacement import Displacement, FactorStep, displacement
from next_core.appliers.folder import WrittenFolder, checked_target
from next_core.errors import ConfigError, GuardError
from next_core.interfaces import LoraFactors, PluginConfig, Prediction, WeightApplier
from next_core.lowrank import LowRank, concatenate, truncated_svd
from next_core.sources.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, PeftAdapterSource
from next_core.storage import new_directory


class PeftAdapterApplierConfig(PluginConfig):
    rank: int | None = Field(None, ge=1, description="Truncate to this rank; without it the adapter is exact")


class PeftAdapterApplier(WeightApplier):
    """Coefficients in factor space give the adapter with its new A and B, of the same rank.

    Any other update is concatenated with the trained adapter, ``[s B, L] [A; R]`` with scaling 1: exact, of rank
    r + k (earlier jumps that stand in adapters of their own are taken in); or truncated to ``rank`` by the SVD of
    that product.
    """

    name = "peft-adapter"
    config_class = PeftAdapterApplierConfig

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: str | Path) -> WrittenFolder:
        source = prediction.source
        if not isinstance(source, PeftAdapterSource):
            raise ConfigError("the applier 'peft-adapter' needs a run of LoRA adapters; use 'merged-model'")
        target = checked_target(prediction, out)
        pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
        for parameter in source.parameters:
            now = source.factors(parameter.name, prediction.step)
            moved = displacement(prediction, parameter.name, alpha)
            pairs[parameter.name] = self._pair(now, moved, source.beside(parameter.name, prediction.step))
        tensors: dict[str, Tensor] = {}
        for name, (A, B, _) in pairs.items():
            module = name.removesuffix(".weight")
            for side, value in (("A", A), ("B", B)):
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = value.float().contiguous()
                if not bool(torch.isfinite(tensors[f"base_model.model.{module}.lora_{side}.weight"]).all()):
                    raise GuardError(f"'{name}' overflows float32 after the jump; nothing was written")
        tensors |= source.extra_tensors(prediction.step)
        with new_directory(target) as folder:
            save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            (folder / CONFIG_FILE).write_text(json.dumps(self._config(source, pairs), indent=2, sort_keys=True))
        return WrittenFolder(target)

    def _pair(
        self, now: LoraFactors, moved: Displacement | None, beside: list[LowRank]
    ) -> tuple[Tensor, Tensor, float]:
        """A, B and the scaling they are to be used with."""
        A, B = now.A.double(), now.B.double()
        if isinstance(moved, FactorStep):
            A, B = A + moved.dA, B + moved.dB
        more = [*beside, moved] if isinstance(moved, LowRank) else beside
        if self.config.rank is None and not more:
            return A, B, now.scaling
        whole = concatenate([LowRank(now.scaling * B, A), *more])
        if self.config.rank is not None and self.config.rank < whole.rank:
            factors = truncated_svd(whole, self.config.rank)
            root = factors.S.sqrt()
            whole = LowRank(factors.U * root, (factors.V * root).T)
        return whole.right, whole.left, 1.0

    def _config(self, source: PeftAdapterSource, pairs: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, Any]:
        raw = dict(source.adapter_config())
        if all(
            scaling == source.scaling(name) and A.shape[0] == source.rank(name)
            for name, (A, _, scaling) in pairs.items()
        ):
            return raw  # every factor kept its rank and scaling: the run's own config is right as it is
        ranks = {name.removesuffix(".weight"): A.shape[0] for name, (A, _, _) in pairs.items()}
        alphas = {name.removesuffix(".weight"): scaling * A.shape[0] for name, (A, _, scaling) in pairs.items()}
        common = max(set(ranks.values()), key=list(ranks.values()).count)
        raw |= {
            "r": common,
            "lora_alpha": common,
            "use_rslora": False,
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != common},
            "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != common},
            "init_lora_weights": True,
        }
        return raw
