"""The prediction as a Hugging Face model folder: backbone, trained delta and jump in one, streamed block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator
from torch import Tensor

from next_core.appliers.blocks import Start, extended_blocks
from next_core.appliers.carried import CARD, copy_files, model_files
from next_core.appliers.displacement import resolved, scaled
from next_core.appliers.folder import (
    SMALL_FILES,
    FolderApplier,
    ReplacedFolder,
    Written,
    WrittenFolder,
    checked_target,
    facts_of,
    outcome,
    record_texts,
    write_texts,
)
from next_core.appliers.landed import Landed
from next_core.appliers.rounding import Rounder, Rounding
from next_core.appliers.stream import DTYPES, Entry, TensorWriter, read_entries
from next_core.errors import CheckpointError, ConfigError
from next_core.interfaces import CheckpointSource, PluginConfig, Prediction
from next_core.sources.full_model import FullModelSource
from next_core.sources.hf_model import INDEX, ModelFiles
from next_core.sources.peft_adapter import PeftAdapterSource
from next_core.sources.ties import tied_names
from next_core.storage import (
    INCOMPLETE,
    MANIFEST,
    atomic_file,
    changing_in_place,
    enough_space,
    manifest_text,
    write_text,
)

FLOATS = {"F64", "F32", "F16", "BF16"}
LIBRARY = "transformers"


class MergedModelConfig(PluginConfig):
    backbone: Path | None = Field(None, description="The base model's folder; default: the one the run was opened with")
    rounding: Rounding = Field("nearest", description="How sums are rounded to bf16 or fp16; stochastic is unbiased")
    seed: int = Field(0, description="Of stochastic rounding")
    in_place: bool = Field(
        False, description="Replace the weights of an existing model folder, shard by shard, instead of making one"
    )

    @model_validator(mode="after")
    def _consistent(self) -> MergedModelConfig:
        if self.seed != 0 and self.rounding == "nearest":
            raise ValueError("seed is of stochastic rounding; set rounding: stochastic, or leave it out")
        return self


class MergedModelApplier(FolderApplier):
    """W_0 + (W_T - W_0) + alpha * jump, computed in fp32 and stored in the backbone's own precision.

    Names, shapes, order and precision are those of the backbone's files (in place: of the folder's own).
    """

    name = "merged-model"
    config_class = MergedModelConfig

    def check(self, prediction: Prediction, out: str | Path) -> Path:
        backbone = self._backbone(prediction)
        target = checked_target(prediction, out, backbone, exists=self.config.in_place)
        _refuse_loss(prediction)
        files = ModelFiles(backbone)
        for head, embedding in tied(prediction.source, files).items():
            files.call_one(head, embedding)
        files.require({parameter.name: parameter.shape for parameter in prediction.source.parameters})
        return target

    def needed(self, prediction: Prediction) -> int:
        return sum(file.path.stat().st_size for file in ModelFiles(self._backbone(prediction)).files)

    def write(self, prediction: Prediction, folders: Mapping[float, Path]) -> dict[float, Written]:
        backbone = self._backbone(prediction)
        job = _Job(self, prediction, backbone, tuple(folders))
        written = {alpha: Written({}, job.landed[alpha]) for alpha in folders}
        for folder in folders.values():
            copy_files(model_files(backbone, (backbone / INDEX).exists()), backbone, folder)
        for file in job.backbone.files:
            paths = {alpha: folder / file.path.name for alpha, folder in folders.items()}
            for alpha, digest in job.write_shard(read_entries(file.path), paths).items():
                written[alpha].digests[file.path.name] = digest
        for alpha, folder in folders.items():
            written[alpha].facts = facts_of(prediction, alpha, self, job.landed[alpha])
            write_texts(folder, record_texts(written[alpha].facts, backbone / CARD, LIBRARY))
        return written

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: str | Path) -> WrittenFolder:
        if not self.config.in_place:
            return super().apply(prediction, alpha, out=out)
        return self._replace(prediction, alpha, self.check(prediction, out))

    def _replace(self, prediction: Prediction, alpha: float, target: Path) -> ReplacedFolder:
        """Shard by shard, each in one go. Values come from the sources alone: an interrupted one is run again."""
        backbone = self._backbone(prediction)
        job = _Job(self, prediction, backbone, (alpha,))
        there = ModelFiles(target)
        for name, shape in {**there.shapes, **job.backbone.shapes}.items():
            if there.shapes.get(name) != job.backbone.shapes.get(name):
                raise ConfigError(f"{target}: '{name}' {shape} is not in both it and {backbone} in this shape")
        largest = max(file.path.stat().st_size for file in there.files)
        facts = facts_of(prediction, alpha, self)
        digests: dict[str, str] = {}
        with (
            enough_space(target, largest + SMALL_FILES),
            outcome(f"{target} is partly old: run it again, with an alpha that fits"),
            changing_in_place(target, facts),
        ):
            for file in there.files:
                with atomic_file(file.path) as scratch:
                    digests[file.path.name] = job.write_shard(read_entries(file.path), {alpha: scratch})[alpha]
            facts = facts_of(prediction, alpha, self, job.landed[alpha])
            for name, text in record_texts(facts, backbone / CARD, LIBRARY).items():
                write_text(target / name, text)
            write_text(target / MANIFEST, manifest_text(target, digests))
        return ReplacedFolder(target, job.landed[alpha], facts)

    def _backbone(self, prediction: Prediction) -> Path:
        backbone: Path | None = self.config.backbone or getattr(prediction.source.config, "backbone", None)
        if backbone is None:
            raise ConfigError("the applier 'merged-model' needs the base model; pass --backbone FOLDER")
        if (backbone / INCOMPLETE).exists():
            raise CheckpointError(f"{backbone} was being written in place and is partly old; run that again first")
        return backbone


class _Job:
    """One prediction on its way into model folders, one for each alpha."""

    def __init__(
        self, applier: MergedModelApplier, prediction: Prediction, backbone: Path, alphas: Sequence[float]
    ) -> None:
        self.backbone = ModelFiles(backbone)
        self.landed = {alpha: Landed() for alpha in alphas}
        self._applier, self._written = applier, 0
        self._prediction = prediction
        self._config: MergedModelConfig = applier.config
        source = prediction.source
        self._trained = {parameter.name for parameter in source.parameters}
        if isinstance(source, FullModelSource):  # norms and biases, which stay as trained
            self._trained |= set(source.skipped)
        self._tied = tied(source, self.backbone)

    def write_shard(self, entries: Mapping[str, Entry], paths: Mapping[float, Path]) -> dict[float, str]:
        """One file for each alpha, of these tensors in this order. Returns their sha256."""
        with contextlib.ExitStack() as stack:
            writers = {alpha: stack.enter_context(TensorWriter(path, entries)) for alpha, path in paths.items()}
            for key, entry in entries.items():
                for alpha, block in self._blocks(key, entry):
                    writers[alpha].write(block)
                self._written += 1
                self._applier.told("write model", self._written, len(self.backbone.shapes))
        return {alpha: writer.sha256 or "" for alpha, writer in writers.items()}

    def _blocks(self, key: str, entry: Entry) -> Iterator[tuple[float, Tensor]]:
        """The blocks of one tensor, first all of one alpha, then all of the next."""
        name = self._tied.get(key, key)
        if name not in self._trained:
            for alpha in self.landed:
                yield alpha, self._untouched(key, entry)
            return
        if entry.dtype not in FLOATS:
            raise ConfigError(
                f"'{key}' is stored as {entry.dtype}, which a jump would drown in; use a backbone in bf16"
            )
        start, once = self._start(name, entry), resolved(self._prediction, name, 1.0)
        for alpha, landed in self.landed.items():
            moved = None if once is None else scaled(self._prediction, name, once, alpha)
            # A tied twin is written from the same name: the same draws, and counted once.
            rounder = Rounder(self._config.rounding, DTYPES[entry.dtype], self._config.seed, name)
            for block in extended_blocks(name, start, moved, rounder, landed):
                yield alpha, block

    def _untouched(self, key: str, entry: Entry) -> Tensor:
        tensor = self.backbone.raw(key)
        return tensor if Entry.of(tensor) == entry else tensor.to(DTYPES[entry.dtype])

    def _start(self, name: str, entry: Entry) -> Start:
        source, step = self._prediction.source, self._prediction.step
        if isinstance(source, FullModelSource):
            return Start(
                entry.shape,
                lambda rows: source.weight(name, step, rows),
                at=lambda since, rows: source.weight(name, since, rows),
            )
        return Start(entry.shape, lambda rows: self.backbone.read(name, rows), source.position(name, step))


def tied(source: CheckpointSource, backbone: ModelFiles) -> Mapping[str, str]:
    """The head's name, where it is one parameter with the embedding that it maps to: written twice or once, but equal.

    Raises ``ConfigError`` where LoRA trained that head: merged, it would move the embeddings too.
    """
    if isinstance(source, FullModelSource):
        return source.tied
    pair = tied_names([backbone])
    if pair is not None and pair[0] in {parameter.name for parameter in source.parameters}:
        raise ConfigError(
            f"the run trains LoRA factors of '{pair[0]}', which shares its weights with '{pair[1]}': merged, the "
            "embeddings would move too; use the applier 'peft-adapter'"
        )
    return dict([pair]) if pair is not None else {}


def _refuse_loss(prediction: Prediction) -> None:
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
