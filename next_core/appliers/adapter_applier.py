"""The prediction as a LoRA adapter on disk, which plain PEFT (and vLLM) loads; no base weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from next_core.appliers.folder_applier import FolderApplier, WrittenFolder, checked_target
from next_core.appliers.folder_contents import CARD, copy_files, facts_of, record_texts, tokenizer_files, write_texts
from next_core.appliers.jump_adapter import factor_keys
from next_core.appliers.safetensors_writer import TensorWriter, header_room
from next_core.errors import CheckpointError, ConfigError, GuardError
from next_core.interfaces import CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction
from next_core.interfaces.prediction import resolve_scaled
from next_core.interfaces.weight_delta import FactorStep, Resolved
from next_core.mathematics.low_rank import LowRank, truncated_svd
from next_core.settings import Settings
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.types import LoraFactors


class PeftAdapterApplierConfig(Settings):
    rank: int | None = Field(None, ge=1, description="Truncate to this rank; without it the adapter is exact")


class PeftAdapterApplier(FolderApplier):
    """Writes the run's adapter with the jump added, in fp32.

    Coefficients in factor space change A and B and keep the rank. Any other update is concatenated with the trained
    adapter, ``[s B, L] [A; R]`` with scaling 1: exact, of rank r + k, or truncated to ``rank`` by the SVD of the
    product. Earlier jumps in adapters of their own are added the same way.
    """

    name = "peft-adapter"
    config_class = PeftAdapterApplierConfig

    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        if not isinstance(source, PeftAdapterSource):
            raise ConfigError(
                "the applier 'peft-adapter' needs a run of LoRA adapters; use 'merged-model'",
                kind="config-contradiction",
            )
        return checked_target(source, out, dry_run=dry_run)

    def needed(self, prediction: Prediction) -> int:
        total = 0
        for parameter in prediction.source.parameters:
            update, rank = prediction.updates.get(parameter.name), parameter.rank or 0
            more = 0
            if isinstance(update, LowRankUpdate):
                more = update.matrix.rank + (rank if prediction.anchor == "backbone" else 0)
            elif isinstance(update, CoefficientUpdate) and update.space == "merged":
                more = rank * len(update.weights)
            total += 4 * sum(parameter.shape) * min(self.config.rank or rank + more, rank + more)
        return total

    def write(self, prediction: Prediction, alpha: float, folder: Path) -> WrittenFolder:
        source, step = prediction.source, prediction.step
        assert isinstance(source, PeftAdapterSource)
        newest, extra = source.folder(step), source.extra_tensors(step)
        used: dict[str, tuple[int, float]] = {}
        room = header_room([key for p in source.parameters for key in factor_keys(p.name)] + list(extra))
        with TensorWriter(folder / WEIGHTS_FILE, room=room) as writer:
            for done, parameter in enumerate(source.parameters, 1):
                name = parameter.name
                moved = resolve_scaled(prediction, name, alpha)
                A, B, scaling = self._factors(source.factors(name, step), moved, source.jump_deltas(name, step))
                used[name] = A.shape[0], scaling
                for key, value in zip(factor_keys(name), (A, B), strict=True):
                    if not math.isfinite(value.sum()) and not bool(torch.isfinite(value).all()):
                        raise GuardError(
                            f"'{name}' overflows float32 after the jump; use a smaller alpha", kind="numbers-overflow"
                        )
                    writer.add(key, value)
                self.report_progress("write adapter", done, len(source.parameters))
            for key, value in extra.items():
                writer.add(key, value)
        (folder / CONFIG_FILE).write_text(json.dumps(_config(source, used, extra), indent=2, sort_keys=True))
        copy_files(tokenizer_files(newest), newest, folder)
        facts = facts_of(prediction, alpha, self)
        write_texts(folder, record_texts(facts, newest / CARD, "peft"))
        return WrittenFolder(folder, facts)

    def _factors(self, now: LoraFactors, moved: Resolved | None, jumps: list[LowRank]) -> tuple[Tensor, Tensor, float]:
        """Return the new A and B in fp32, and their scaling."""
        A, B = now.A, now.B
        if isinstance(moved, FactorStep):
            A, B = A + moved.dA, B + moved.dB
        more = [*jumps, moved] if isinstance(moved, LowRank) else jumps
        if self.config.rank is None and not more:
            return A.float(), B.float(), now.scaling
        whole = _concatenated(now.scaling * B, A, more)
        if self.config.rank is not None and self.config.rank < whole.rank:
            factors = truncated_svd(whole.to(torch.float64), self.config.rank)
            root = factors.S.sqrt()
            whole = LowRank(factors.U * root, (factors.V * root).T)
        return whole.right.float(), whole.left.float(), 1.0


def _concatenated(left: Tensor, right: Tensor, terms: list[LowRank]) -> LowRank:
    """Return left @ right + the sum of terms.

    A secant in merged space is [s B_T, -s B_t] [A_T; A_t], and its A_T is already in ``right``: such a part adds to
    ``left`` instead of the rank.
    """
    rank, rest = right.shape[0], [LowRank(left[:, :0], right[:0])]
    for term in terms:
        for begin in range(0, term.rank, rank):
            part = LowRank(term.left[:, begin : begin + rank], term.right[begin : begin + rank])
            if torch.equal(part.right, right.to(part.right.dtype)):
                left = left + part.left
            else:
                rest.append(part)
    return LowRank(
        torch.cat([left.float(), *(part.left.float() for part in rest)], -1),
        torch.cat([right.float(), *(part.right.float() for part in rest)], -2),
    )


def _config(source: PeftAdapterSource, used: Mapping[str, tuple[int, float]], extra: Collection[str]) -> dict[str, Any]:
    """Return the run's own ``adapter_config.json`` with the ranks and scalings that are ``used`` now."""
    raw = source.adapter_config()
    if all((rank, scaling) == (source.rank(name), source.scaling(name)) for name, (rank, scaling) in used.items()):
        return raw
    partial = next((key for key in extra if ".lora_" in key), None)
    if partial is not None:
        raise CheckpointError(
            f"'{partial}' keeps the rank and scaling of the run, and the jump changes both: use a predictor with "
            "space: factors and no rank here, or train without LoRA biases, embeddings and convolutions",
            kind="checkpoint-unsupported-adapter",
        )
    ranks = {name.removesuffix(".weight"): rank for name, (rank, _) in used.items()}
    alphas = {name.removesuffix(".weight"): scaling * rank for name, (rank, scaling) in used.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    return raw | {
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != common},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != common},
        "init_lora_weights": True,
    }
