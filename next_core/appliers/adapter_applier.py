"""The prediction as a LoRA adapter on disk, which plain PEFT (and vLLM) loads; no base weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from next_core.appliers.folder_applier import FolderApplier, WrittenFolder, checked_target
from next_core.appliers.folder_contents import CARD, copy_files, facts_of, record_texts, tokenizer_files, write_texts
from next_core.appliers.jump_adapter import rank_settings
from next_core.appliers.safetensors_writer import TensorWriter, entry_of
from next_core.errors import GuardError, contradiction
from next_core.interfaces import CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction
from next_core.interfaces.prediction import resolve
from next_core.interfaces.weight_delta import FactorStep, Resolved
from next_core.mathematics.low_rank import LowRank, truncated_svd
from next_core.settings import Settings
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.adapter_tensors import AdapterModule, bias_key
from next_core.types import LoraFactors


class PeftAdapterApplierConfig(Settings):
    rank: int | None = Field(None, ge=1, description="Truncate to this rank; without it the adapter is exact")


class PeftAdapterApplier(FolderApplier):
    """Writes the run's adapter with the jump added, in fp32.

    Coefficients in factor space change A and B and keep the rank. Any other update is concatenated with the trained
    adapter, ``[s B, L] [A; R]`` with scaling 1: exact, of rank r + k, or truncated to ``rank`` by the SVD of the
    product. Earlier jumps in adapters of their own are added the same way. What is not extrapolated (embeddings,
    convolutions, biases, whole modules) stays as trained.
    """

    name = "peft-adapter"
    config_class = PeftAdapterApplierConfig

    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        if not isinstance(source, PeftAdapterSource):
            raise contradiction("the applier 'peft-adapter' needs a run of LoRA adapters; use 'merged-model'")
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
        own = {module.target: (module.rank, module.scaling) for module in source.modules}
        used = dict(own)
        moving = [module for module in source.modules if module.moves]
        tensors: dict[str, Tensor] = {}
        for done, module in enumerate(moving, 1):
            A, B, scaling = self._module(prediction, source, module, alpha)
            used[module.target] = len(A) // module.experts, scaling
            for key, value in zip(module.keys, (A, B), strict=True):
                if not math.isfinite(value.sum()) and not bool(torch.isfinite(value).all()):
                    raise GuardError(
                        f"'{module.name}.weight' overflows float32 after the jump; use a smaller alpha",
                        kind="numbers-overflow",
                    )
                tensors[key] = value
            bias = bias_key(module.name)
            if bias in extra and scaling != module.scaling:  # PEFT scales it as it does B A
                extra[bias] = extra[bias] * (module.scaling / scaling)
            tied = source.tied_embedding(module)
            if tied is not None:
                extra |= zip(tied.keys, (B.T, A.T), strict=True)
                used[tied.target] = used[module.target]
            self.report_progress("write adapter", done, len(moving))
        tensors |= extra
        entries = {key: entry_of(value.dtype, value.shape) for key, value in tensors.items()}
        with TensorWriter(folder / WEIGHTS_FILE, entries) as writer:
            for value in tensors.values():
                writer.write(value)
        config = source.adapter_config()
        if used != own:
            config |= rank_settings(used) | {"init_lora_weights": True}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
        copy_files(tokenizer_files(newest), newest, folder)
        facts = facts_of(prediction, alpha, self)
        write_texts(folder, record_texts(facts, newest / CARD, "peft"))
        return WrittenFolder(folder, facts, digests={WEIGHTS_FILE: writer.digest})

    def _module(
        self, prediction: Prediction, source: PeftAdapterSource, module: AdapterModule, alpha: float
    ) -> tuple[Tensor, Tensor, float]:
        """Return the new A and B of a module as they are stored, and their scaling."""
        parts = []
        for name in (parameter.name for parameter in module.parameters):
            moved = resolve(prediction, name, alpha)
            now, jumps = source.factors(name, prediction.step), source.jump_deltas(name, prediction.step)
            parts.append(self._factors(now, moved, jumps))
        scalings = {scaling for *_, scaling in parts}
        if len(scalings) == 1:  # always, but for experts of which only some move
            return *module.fused([(A, B) for A, B, _ in parts]), scalings.pop()
        return *module.fused([(A, scaling * B) for A, B, scaling in parts]), 1.0

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
