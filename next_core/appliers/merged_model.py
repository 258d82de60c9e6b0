"""The prediction as a Hugging Face model folder: backbone, trained delta and jump in one, streamed block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator
from torch import Tensor

from next_core.appliers.blocks import Start, extended_blocks
from next_core.appliers.copied_files import CARD, copy_files, model_files
from next_core.appliers.folder_applier import (
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
from next_core.appliers.rounding import Rounder, Rounding
from next_core.appliers.rounding_loss import Landed
from next_core.appliers.stream import TensorWriter, read_entries
from next_core.errors import CheckpointError, ConfigError
from next_core.interfaces import CheckpointSource, Prediction
from next_core.interfaces.prediction import resolved, scaled
from next_core.settings import Settings
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.full_model import FullModelSource
from next_core.sources.hf_model import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, ModelFiles
from next_core.sources.tensor_files import STORED
from next_core.sources.tied_weights import tied_names
from next_core.storage.atomic import atomic_file, changing_in_place, enough_space, seal, sweep_siblings, write_text
from next_core.storage.manifest import INCOMPLETE
from next_core.storage.safetensors_header import Entry

FLOATS = {"F64", "F32", "F16", "BF16"}
LIBRARY = "transformers"


class MergedModelConfig(Settings):
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

    Names, shapes, order and precision are those of the backbone's files (in place: of the folder's own). Integers,
    scalars and what is stored in 8 bits are copied as they are stored: from the newest checkpoint where that has them.
    """

    name = "merged-model"
    config_class = MergedModelConfig

    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        backbone = self._backbone(source)
        target = checked_target(source, out, backbone, in_place=self.config.in_place, dry_run=dry_run)
        _refuse_loss(source)
        _refuse_pickles(backbone)
        files = ModelFiles(backbone)
        pairs = tied(source, files)
        for head, embedding in pairs.items():
            files.call_one(head, embedding)
        files.require({parameter.name: parameter.shape for parameter in source.parameters})
        if self.config.in_place:
            _refuse_pickles(target)
            _refuse_another_model(ModelFiles(target), ModelFiles(backbone))
        _Plan(source, ModelFiles(backbone), pairs).check(ModelFiles(target) if self.config.in_place else None)
        return target

    def check(self, prediction: Prediction, out: str | Path) -> Path:
        target = super().check(prediction, out)
        files = ModelFiles(self._backbone(prediction.source))
        plan = _Plan(prediction.source, files, tied(prediction.source, files))
        jumps = {name for name in prediction.updates if prediction.weight(name) != 0.0}
        for key, entry in _entries(ModelFiles(target) if self.config.in_place else files).items():
            if plan.name(key) in jumps and not plan.moves(key, entry):
                raise _would_drown(key, entry)
        return target

    def needed(self, prediction: Prediction) -> int:
        return sum(file.path.stat().st_size for file in ModelFiles(self._backbone(prediction.source)).files)

    def write(self, prediction: Prediction, folders: Mapping[float, Path]) -> dict[float, Written]:
        backbone = self._backbone(prediction.source)
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
        backbone = self._backbone(prediction.source)
        job = _Job(self, prediction, backbone, (alpha,))
        there = ModelFiles(target)
        for file in there.files:
            sweep_siblings(file.path)
        largest = max(file.path.stat().st_size for file in there.files)
        facts = facts_of(prediction, alpha, self)
        record_texts(facts, backbone / CARD, LIBRARY)  # a card that cannot be read: before anything is changed
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
                write_text(target / name, text, errors="surrogateescape")
            seal(target, digests)
        return ReplacedFolder(target, job.landed[alpha], facts)

    def _backbone(self, source: CheckpointSource) -> Path:
        backbone: Path | None = self.config.backbone or getattr(source.config, "backbone", None)
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
        self._plan = _Plan(prediction.source, self.backbone, tied(prediction.source, self.backbone), prediction.step)

    def write_shard(self, entries: Mapping[str, Entry], paths: Mapping[float, Path]) -> dict[float, str]:
        """One file for each alpha, of these tensors in this order. Returns their sha256."""
        with contextlib.ExitStack() as stack:
            writers = {alpha: stack.enter_context(TensorWriter(path, entries)) for alpha, path in paths.items()}
            for key, entry in entries.items():
                for alpha, block in self._blocks(key, entry):
                    writers[alpha].write(block)
                self._written += 1
                self._applier.report_progress("write model", self._written, len(self.backbone.shapes))
        return {alpha: writer.sha256 or "" for alpha, writer in writers.items()}

    def _blocks(self, key: str, entry: Entry) -> Iterator[tuple[float, Tensor]]:
        """The blocks of one tensor, first all of one alpha, then all of the next."""
        name = self._plan.name(key)
        if not self._plan.moves(key, entry):
            stored = self._plan.stored_in(key).raw(name if name in self._plan.trained else key)
            for alpha in self.landed:
                yield alpha, stored.to(STORED[entry.dtype])
            return
        start, once = self._start(name, entry), resolved(self._prediction, name, 1.0)
        for alpha, landed in self.landed.items():
            moved = None if once is None else scaled(self._prediction, name, once, alpha)
            # A tied twin is written from the same name: the same draws, and counted once.
            rounder = Rounder(self._config.rounding, STORED[entry.dtype], self._config.seed, name)
            for block in extended_blocks(name, start, moved, rounder, landed):
                yield alpha, block

    def _start(self, name: str, entry: Entry) -> Start:
        source, step = self._prediction.source, self._prediction.step
        if isinstance(source, FullModelSource):
            return Start(
                entry.shape,
                lambda rows: source.weight(name, step, rows),
                at=lambda since, rows: source.weight(name, since, rows),
            )
        return Start(entry.shape, lambda rows: self.backbone.read(name, rows), source.position(name, step))


class _Plan:
    """Which tensors of a written model are computed, and where the others are copied from."""

    def __init__(
        self, source: CheckpointSource, backbone: ModelFiles, pairs: Mapping[str, str], step: int | None = None
    ) -> None:
        self._source, self._backbone, self._tied = source, backbone, pairs
        self._newest = next(iter(source.steps[-1:]), None) if step is None else step
        self.trained = {parameter.name for parameter in source.parameters}
        if isinstance(source, FullModelSource):  # norms and biases, which stay as trained
            self.trained |= set(source.skipped)

    def name(self, key: str) -> str:
        """What the run calls a tensor of the model."""
        return self._tied.get(key, key)

    def moves(self, key: str, entry: Entry) -> bool:
        """Whether a tensor is trained, and written as a sum; else it is copied."""
        return self.name(key) in self.trained and entry.dtype in FLOATS and len(entry.shape) > 0

    def stored_in(self, key: str) -> ModelFiles:
        """The files that a tensor is copied from."""
        if isinstance(self._source, FullModelSource) and self._newest is not None and self.name(key) in self.trained:
            return self._source.model(self._newest)
        return self._backbone

    def check(self, target: ModelFiles | None = None) -> None:
        """Raise ``ConfigError`` for what can neither be computed nor copied into these files (None: the backbone)."""
        into = target or self._backbone
        for key, entry in _entries(into).items():
            name, files = self.name(key), self.stored_in(key)
            if entry.dtype not in STORED:
                raise ConfigError(
                    f"{into.folder}: '{key}' is stored as {entry.dtype}; known are {', '.join(STORED)}: use a backbone "
                    "in bf16, or the applier 'peft-adapter'"
                )
            if name not in self.trained:
                name = key
            elif not isinstance(self._source, FullModelSource):
                if not self.moves(key, entry):
                    raise _would_drown(key, entry)
                continue
            have, wanted = files.dtype(name), STORED[entry.dtype]
            if tuple(files.shapes[name]) != entry.shape:
                raise ConfigError(
                    f"{into.folder}: '{key}' is {entry.shape} but {tuple(files.shapes[name])} in {files.folder}; is it "
                    "the model of this run?"
                )
            # Between two precisions floats are rounded; anything else would mean another thing.
            floats = entry.dtype in FLOATS and have.is_floating_point
            if have != wanted and not floats:
                raise ConfigError(
                    f"'{key}' is stored as {entry.dtype} in {into.folder} but as {str(have).removeprefix('torch.')} in "
                    f"{files.folder}; use a backbone that stores it as the checkpoints do"
                )


def _entries(files: ModelFiles) -> dict[str, Entry]:
    return {key: entry for file in files.files for key, entry in read_entries(file.path).items()}


def _would_drown(key: str, entry: Entry) -> ConfigError:
    return ConfigError(f"'{key}' is stored as {entry.dtype}, which a jump would drown in; use a backbone in bf16")


def _refuse_pickles(folder: Path) -> None:
    """A model is written in the layout of a safetensors file that is there."""
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        return
    for name in (PICKLE_SINGLE, PICKLE_INDEX):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name} is a pickle, and a merged model is written like a safetensors backbone: load it with "
                "transformers and save it by save_pretrained, or use the applier 'peft-adapter'"
            )


def _refuse_another_model(there: ModelFiles, backbone: ModelFiles) -> None:
    for name, shape in {**there.shapes, **backbone.shapes}.items():
        if there.shapes.get(name) != backbone.shapes.get(name):
            raise ConfigError(
                f"{there.folder}: '{name}' {shape} is not in both it and {backbone.folder} in this shape; choose a "
                "copy of the backbone"
            )


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


def _refuse_loss(source: CheckpointSource) -> None:
    """Whatever else was trained has to be in a merged model too."""
    if not isinstance(source, PeftAdapterSource):
        return
    if source.skipped:
        raise ConfigError(
            f"the run trains more than LoRA factors of linear layers ('{next(iter(source.skipped))}'), which a "
            "merged model would lose; use the applier 'peft-adapter'"
        )
    if source.steps and source.adapter_config().get("fan_in_fan_out"):
        raise ConfigError("the adapter is of transposed layers (fan_in_fan_out); use the applier 'peft-adapter'")
