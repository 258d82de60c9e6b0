"""The prediction as a LoRA adapter on disk, which plain PEFT (and vLLM) loads; no base weight is read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from next_core.appliers.copied_files import CARD, copy_files, tokenizer_files
from next_core.appliers.folder_applier import (
    FolderApplier,
    Written,
    checked_target,
    facts_of,
    record_texts,
    write_texts,
)
from next_core.appliers.stream import TensorWriter, header_room
from next_core.errors import ConfigError, GuardError
from next_core.interfaces import CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction
from next_core.interfaces.prediction import FactorStep, Resolved, resolved, scaled
from next_core.mathematics.low_rank import LowRank, truncated_svd
from next_core.settings import Settings
from next_core.sources.adapter_source import CONFIG_FILE, WEIGHTS_FILE, PeftAdapterSource
from next_core.types import LoraFactors

LIBRARY = "peft"


class PeftAdapterApplierConfig(Settings):
    rank: int | None = Field(None, ge=1, description="Truncate to this rank; without it the adapter is exact")


class PeftAdapterApplier(FolderApplier):
    """Coefficients in factor space give the adapter with its new A and B, of the same rank.

    Any other update is concatenated with the trained adapter, ``[s B, L] [A; R]`` with scaling 1: exact, of rank
    r + k (earlier jumps that stand in adapters of their own are taken in; a checkpoint whose A is there already adds
    to its B and not to the rank); or truncated to ``rank`` by the SVD of that product. Factors are stored in fp32.
    """

    name = "peft-adapter"
    config_class = PeftAdapterApplierConfig

    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        if not isinstance(source, PeftAdapterSource):
            raise ConfigError("the applier 'peft-adapter' needs a run of LoRA adapters; use 'merged-model'")
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

    def write(self, prediction: Prediction, folders: Mapping[float, Path]) -> dict[float, Written]:
        source = prediction.source
        assert isinstance(source, PeftAdapterSource)
        used: dict[float, dict[str, tuple[int, float]]] = {alpha: {} for alpha in folders}
        extra = source.extra_tensors(prediction.step)
        names = [key for p in source.parameters for key in _keys(p.name)]
        with contextlib.ExitStack() as stack:
            writers = {
                alpha: stack.enter_context(TensorWriter(folder / WEIGHTS_FILE, room=header_room([*names, *extra])))
                for alpha, folder in folders.items()
            }
            for done, parameter in enumerate(source.parameters, 1):
                now = source.factors(parameter.name, prediction.step)
                once = resolved(prediction, parameter.name, 1.0)
                beside = source.beside(parameter.name, prediction.step)
                for alpha, writer in writers.items():
                    moved = None if once is None else scaled(prediction, parameter.name, once, alpha)
                    A, B, scaling = self._pair(now, moved, beside)
                    used[alpha][parameter.name] = A.shape[0], scaling
                    for key, value in zip(_keys(parameter.name), (A, B), strict=True):
                        if not math.isfinite(value.sum()) and not bool(torch.isfinite(value).all()):
                            raise GuardError(f"'{parameter.name}' overflows float32 after the jump")
                        writer.add(key, value)
                self.report_progress("write adapter", done, len(source.parameters))
            for key, value in extra.items():
                for writer in writers.values():
                    writer.add(key, value)
        newest = source.folder(prediction.step)
        written = {}
        for alpha, folder in folders.items():
            (folder / CONFIG_FILE).write_text(json.dumps(_config(source, used[alpha]), indent=2, sort_keys=True))
            copy_files(tokenizer_files(newest), newest, folder)
            written[alpha] = Written(facts_of(prediction, alpha, self))
            write_texts(folder, record_texts(written[alpha].facts, newest / CARD, LIBRARY))
        return written

    def _pair(self, now: LoraFactors, moved: Resolved | None, beside: list[LowRank]) -> tuple[Tensor, Tensor, float]:
        """A, B in fp32 and the scaling they are to be used with."""
        A, B = now.A, now.B
        if isinstance(moved, FactorStep):
            A, B = A + moved.dA, B + moved.dB
        more = [*beside, moved] if isinstance(moved, LowRank) else beside
        if self.config.rank is None and not more:
            return A.float(), B.float(), now.scaling
        whole = _absorbed(now.scaling * B, A, more)
        if self.config.rank is not None and self.config.rank < whole.rank:
            factors = truncated_svd(whole.to(torch.float64), self.config.rank)
            root = factors.S.sqrt()
            whole = LowRank(factors.U * root, (factors.V * root).T)
        return whole.right.float(), whole.left.float(), 1.0


def _absorbed(left: Tensor, right: Tensor, more: list[LowRank]) -> LowRank:
    """left @ right + more: a term whose right factor is ``right`` adds to ``left`` and not to the rank."""
    rank, rest = right.shape[0], [LowRank(left[:, :0], right[:0])]
    for part in more:
        begin = 0
        while begin < part.rank:
            end = min(begin + rank, part.rank)
            same = end - begin == rank and torch.equal(part.right[begin:end], right.to(part.right.dtype))
            if same:
                left = left + part.left[:, begin:end]
            else:
                rest.append(LowRank(part.left[:, begin:end], part.right[begin:end]))
            begin = end
    return LowRank(
        torch.cat([left.float(), *(part.left.float() for part in rest)], -1),
        torch.cat([right.float(), *(part.right.float() for part in rest)], -2),
    )


def _keys(name: str) -> tuple[str, str]:
    module = name.removesuffix(".weight")
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _config(source: PeftAdapterSource, used: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The run's own ``adapter_config.json``, with the ranks and scalings that are used now."""
    raw = dict(source.adapter_config())
    if all(scaling == source.scaling(name) and rank == source.rank(name) for name, (rank, scaling) in used.items()):
        return raw  # every factor kept its rank and scaling: the run's own config is right as it is
    ranks = {name.removesuffix(".weight"): rank for name, (rank, _) in used.items()}
    alphas = {name.removesuffix(".weight"): scaling * rank for name, (rank, scaling) in used.items()}
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
