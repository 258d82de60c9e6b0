"""The prediction as a LoRA adapter on disk, which plain PEFT (and vLLM) loads; no base weight is read."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
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
from next_core.interfaces.weight_delta import FactorStep
from next_core.mathematics.low_rank import LowRank, truncated_svd
from next_core.settings import Settings
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.adapter_tensors import AdapterModule, bias_key
from next_core.storage.reading import Entry
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
        source = prediction.source
        assert isinstance(source, PeftAdapterSource)
        trained, modules = source.adapter(prediction.step), source.modules
        moving = [module for module in modules if module.moves]
        ranks = {module.target: module.rank for module in modules}
        joins = self.config.rank is not None
        entries: dict[str, Entry] = {}
        stored = {key: trained.file.dtype(key) for key in trained.skipped}
        as_read = {key: dtype if dtype.itemsize >= 4 else torch.float32 for key, dtype in stored.items()}
        kept = {key: entry_of(dtype, trained.file.shapes[key]) for key, dtype in as_read.items()}
        tied: dict[str, AdapterModule] = {}
        for module in moving:  # only shapes: they are the file's header, and memory holds the tensors of one module
            rank, joined = self._rank(prediction, source, module, alpha)
            ranks[module.target], joins = rank, joins or joined
            (m, n), width = module.shape, rank * module.experts
            entries |= zip(module.keys, _entries((width, n), (m, width)), strict=True)
            embedding = source.tied_embedding(module)
            if embedding is not None:
                tied[module.name], ranks[embedding.target] = embedding, rank
                kept |= zip(embedding.keys, _entries((width, m), (n, width)), strict=True)
        # All scalings become 1: vLLM ignores alpha_pattern, and PEFT finds no names in it that transformers changed.
        scaled = modules if joins else ()
        scalings = {key: each.scaling for each in scaled for key in (bias_key(each.name), each.keys[1])}
        transposed: dict[str, Tensor] = {}
        with TensorWriter(folder / WEIGHTS_FILE, entries | kept) as writer:
            for done, module in enumerate(moving, 1):
                A, B = module.fused(
                    [self._factors(prediction, source, p.name, alpha, joins) for p in module.parameters]
                )
                # No entry of s B A is larger than r |s| max|A| max|B|; a NaN in A or B makes this NaN, which fails too.
                scaling = 1.0 if joins else abs(module.scaling)
                largest = math.prod(float(max(-low, high)) for low, high in (A.aminmax(), B.aminmax()))
                if not len(A) * scaling * largest <= torch.finfo(torch.float32).max:
                    raise GuardError(
                        f"'{module.name}.weight' overflows float32 after the jump; use a smaller alpha",
                        kind="numbers-overflow",
                    )
                writer.write(A)
                writer.write(B)
                if module.name in tied:
                    transposed |= zip(tied[module.name].keys, (B.T, A.T), strict=True)
                self.report_progress("write adapter", done, len(moving))
            for key in kept:
                value = transposed[key] if key in transposed else trained.file.read(key)
                writer.write(value * scalings[key] if key in scalings and key not in transposed else value)
        config = source.adapter_config()
        if joins:
            config |= rank_settings(ranks) | {"init_lora_weights": True}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
        copy_files(tokenizer_files(trained.folder), trained.folder, folder)
        facts = facts_of(prediction, alpha, self)
        write_texts(folder, record_texts(facts, trained.folder / CARD, "peft"))
        return WrittenFolder(folder, facts, digests={WEIGHTS_FILE: writer.digest})

    def _rank(
        self, prediction: Prediction, source: PeftAdapterSource, module: AdapterModule, alpha: float
    ) -> tuple[int, bool]:
        """Return the rank of a module's new A and B without computing them, and whether anything joins its own."""
        ranks, joined, limit = [], False, self.config.rank
        for parameter in module.parameters:
            now, more = _moved(prediction, source, parameter.name, alpha)
            rank = module.rank + sum(part.rank for part, same in _parts(now.A, more) if not same)
            ranks.append(rank if limit is None or limit >= rank else min(limit, *module.shape))
            joined = joined or bool(more)
        return max(ranks), joined

    def _factors(
        self, prediction: Prediction, source: PeftAdapterSource, name: str, alpha: float, joins: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the new A and B of a parameter in fp32, with its scaling in B if anything joins those of any."""
        now, more = _moved(prediction, source, name, alpha)
        whole = _concatenated(now.scaling * now.B if joins else now.B, now.A, more)
        if self.config.rank is not None and self.config.rank < whole.rank:
            factors = truncated_svd(whole.to(torch.float64), self.config.rank)
            root = factors.S.sqrt()
            whole = LowRank(factors.U * root, (factors.V * root).T)
        return whole.right.float(), whole.left.float()


def _entries(*shapes: tuple[int, int]) -> list[Entry]:
    return [entry_of(torch.float32, shape) for shape in shapes]


def _moved(
    prediction: Prediction, source: PeftAdapterSource, name: str, alpha: float
) -> tuple[LoraFactors, list[LowRank]]:
    """Return a parameter's factors, with the jump if that moves them, and what joins them: earlier jumps, and this."""
    now, moved = source.factors(name, prediction.step), resolve(prediction, name, alpha)
    if isinstance(moved, FactorStep):
        now = replace(now, A=now.A + moved.dA, B=now.B + moved.dB)
    return now, source.jump_deltas(name, prediction.step) + ([moved] if isinstance(moved, LowRank) else [])


def _parts(right: Tensor, terms: list[LowRank]) -> Iterator[tuple[LowRank, bool]]:
    """Split terms into parts of the adapter's rank, and say of each whether its right factor is the adapter's.

    A secant in merged space is [s B_T, -s B_t] [A_T; A_t], and its A_T is already in ``right``: such a part adds to the
    left factor instead of the rank.
    """
    rank = len(right)
    for term in terms:
        for begin in range(0, term.rank, rank):
            part = LowRank(term.left[:, begin : begin + rank], term.right[begin : begin + rank])
            yield part, part.rank == rank and torch.equal(part.right, right.to(part.right.dtype))


def _concatenated(left: Tensor, right: Tensor, terms: list[LowRank]) -> LowRank:
    """Return left @ right + the sum of terms."""
    rest = []
    for part, same in _parts(right, terms):
        if same:
            left = left + part.left
        else:
            rest.append(part)
    return LowRank(
        torch.cat([left.float(), *(part.left.float() for part in rest)], -1),
        torch.cat([right.float(), *(part.right.float() for part in rest)], -2),
    )
