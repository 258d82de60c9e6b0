"""The prediction as a Hugging Face model folder: backbone, training and jump in one, streamed block by block."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from next_core.appliers.folder_applier import FolderApplier, WrittenFolder, checked_target
from next_core.appliers.folder_contents import CARD, copy_files, facts_of, model_files, record_texts, write_texts
from next_core.appliers.merged_tensors import TensorPlan, jumped_blocks
from next_core.appliers.rounding import Rounder, Rounding, RoundingLoss
from next_core.appliers.safetensors_writer import TensorWriter, entry_of
from next_core.errors import CheckpointError, ConfigError
from next_core.interfaces import CheckpointSource, Prediction
from next_core.interfaces.prediction import resolve
from next_core.interfaces.weight_delta import LazyDelta, transposed
from next_core.settings import Settings
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.adapter_tensors import BASE_LAYER, PREFIX, is_expert
from next_core.sources.backbone import refuse_quantized, require
from next_core.sources.hf_model import MODEL_CONFIG, SINGLE, ModelFiles, architecture_of
from next_core.sources.layouts import MODEL_FILES, MODEL_PICKLES, SHARDS, has_any
from next_core.sources.matrices import HEADS
from next_core.sources.tensor_files import TensorFile

LIBRARY = "transformers"
NOT_MERGEABLE = {
    "alora_invocation_tokens": "acts only after its invocation tokens (activated LoRA)",
    "layer_replication": "repeats layers of the backbone",
}
"""Fields of an adapter's config that say that its B A cannot simply be added to the weights."""
TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Models made of transformers' ``Conv1D``, as long as transformers cannot say so."""


class RoundingConfig(Settings):
    rounding: Rounding = Field("nearest", description="How sums are rounded to bf16 or fp16; stochastic is unbiased")
    seed: int = Field(0, description="Seed of stochastic rounding")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seed != 0 and self.rounding == "nearest":
            raise ValueError("seed is for stochastic rounding; set rounding: stochastic, or omit seed")
        return self


class MergedModelConfig(RoundingConfig):
    backbone: Path | None = Field(None, description="The base model's folder; default: the one the run was opened with")


class MergedModelApplier(FolderApplier):
    """Writes W_0 + (W_T - W_0) + alpha * jump, computed in fp32 and rounded once.

    Names, shapes, order and precision are those of the backbone's files. Integers, scalars and 8-bit tensors are
    copied.
    """

    name = "merged-model"
    config_class = MergedModelConfig

    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        backbone = model_layout(source, self.config.backbone)
        target = checked_target(source, out, backbone, dry_run=dry_run)
        _refuse_pickles(backbone)
        files = ModelFiles(backbone)
        refuse_quantized(files)
        if files.renamed:
            raise CheckpointError(
                f"{backbone} stores '{next(iter(files.renamed))}', a name of torch.compile's or another wrapper, which "
                "transformers does not load; save the model without the wrapper, or pass another --backbone",
                kind="checkpoint-other-names",
            )
        plan = TensorPlan(source, files)
        _refuse_unmergeable(source, files)
        require(files, {parameter.name: parameter.shape for parameter in source.parameters})
        plan.check(files)
        return target

    def check(self, prediction: Prediction, out: str | Path) -> Path:
        target = super().check(prediction, out)
        files = ModelFiles(model_layout(prediction.source, self.config.backbone))
        TensorPlan(prediction.source, files).check(files, prediction.moving)
        return target

    def needed(self, prediction: Prediction) -> int:
        layout = ModelFiles(model_layout(prediction.source, self.config.backbone))
        return sum(file.path.stat().st_size for file in layout.files)

    def write(self, prediction: Prediction, alpha: float, folder: Path) -> WrittenFolder:
        backbone = model_layout(prediction.source, self.config.backbone)
        copy_files(model_files(backbone), backbone, folder)
        layout = ModelFiles(backbone)
        writer = ModelWriter(self, prediction, alpha, layout)
        for file in layout.files:
            writer.write_shard(file, folder / file.path.name)
        facts = facts_of(prediction, alpha, self, writer.loss) | {"from_backbone": writer.plan.from_backbone}
        write_texts(folder, record_texts(facts, backbone / CARD, LIBRARY))
        return WrittenFolder(folder, facts, writer.loss.shares(), writer.digests)


def model_layout(source: CheckpointSource, backbone: str | Path | None = None) -> Path:
    """Return the folder that gives a merged model its names, precisions and other files.

    That is the backbone; without one, the newest checkpoint if it is a whole model. Raises ``ConfigError`` if there is
    neither.
    """
    given = backbone or getattr(source.config, "backbone", None)
    if given is not None:
        return Path(given)
    newest = source.model(source.steps[-1]).folder if source.stores_full_weights and source.steps else None
    if newest is None or not (newest / MODEL_CONFIG).exists():
        raise ConfigError(
            "the applier 'merged-model' needs the base model or checkpoints with a config.json; pass --backbone FOLDER",
            kind="config-missing-backbone",
        )
    return newest


class ModelWriter:
    """Computes the tensors of a model with one prediction at one alpha, and writes its files."""

    def __init__(self, applier: FolderApplier, prediction: Prediction, alpha: float, backbone: ModelFiles) -> None:
        self.loss = RoundingLoss()
        self.digests: dict[str, str] = {}
        self._applier, self._prediction, self._alpha = applier, prediction, alpha
        self._backbone, self._done = backbone, 0
        self._total = sum(len(file.shapes) for file in self._backbone.files)
        self.plan = TensorPlan(prediction.source, self._backbone, prediction.step)

    def write_shard(self, file: TensorFile, path: Path) -> None:
        """Write to ``path`` the tensors of ``file`` in their order."""
        entries = {key: entry_of(file.dtype(key), shape) for key, shape in file.shapes.items()}
        with TensorWriter(path, entries) as writer:
            for key, shape in file.shapes.items():
                for block in self._blocks(key, file.dtype(key), shape):
                    writer.write(block)
                self._done += 1
                self._applier.report_progress("write model", self._done, self._total)
        self.digests[file.path.name] = writer.digest

    def _blocks(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterable[Tensor]:
        if not self.plan.computes(key, dtype, shape):
            return (block.to(dtype) for block in self.plan.copied(key, shape))
        parts = self.plan.parts(key, shape).items()
        return itertools.chain.from_iterable(self.computed(name, dtype, size) for name, size in parts)

    def computed(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterable[Tensor]:
        """Yield the rows of a parameter of the run, with the jump, in blocks."""
        config, source, step = self._applier.config, self._prediction.source, self._prediction.step
        trained = None if source.stores_full_weights else source.position(name, step)
        moved = resolve(self._prediction, name, self._alpha)
        if name in self.plan.transposed:  # the run's matrix is (out, in), the stored one (in, out)
            trained, moved = None if trained is None else trained.T, transposed(moved)

        def read(rows: slice) -> Tensor:
            return source.weight_as_stored(name, step, rows) if trained is None else self._backbone.read(name, rows)

        def check(rows: slice) -> None:
            since = (step, *(moved.weights if isinstance(moved, LazyDelta) else ())) if trained is None else ()
            for each in since:
                source.weight(name, each, rows)

        # A tied head is written under the embedding's name: the same random draws, and counted once.
        rounder = Rounder(config.rounding, dtype, config.seed, name)
        return jumped_blocks(name, shape, read, trained, moved, rounder, self.loss, check)


def _refuse_pickles(folder: Path) -> None:
    """Raise ``CheckpointError`` for a model without safetensors files, whose layout the written model takes."""
    name = next((name for name in (*MODEL_FILES, *MODEL_PICKLES, SHARDS) if has_any(folder, (name,))), SINGLE)
    if name not in MODEL_FILES:
        raise CheckpointError(
            f"{folder / name} is a pickle, and a merged model takes the layout of a safetensors backbone: load it "
            "with transformers and save it by save_pretrained, or pass the base model as --backbone",
            kind="checkpoint-pickle",
        )


def _refuse_unmergeable(source: CheckpointSource, backbone: ModelFiles) -> None:
    """Raise ``CheckpointError`` for a LoRA run of which a merged model would lose or misplace a part."""
    if not isinstance(source, PeftAdapterSource):
        return
    config = source.adapter_config() if source.steps else {}
    reasons = [f"the adapter {why} ({field})" for field, why in NOT_MERGEABLE.items() if config.get(field)]
    built = architecture_of(backbone.folder)
    reasons += [
        f"the run trains '{parameter.name}', which shares its weights with another layer: both would move"
        for parameter in source.parameters
        if (built.is_tied(parameter.name) if built else backbone.declares_tie() and parameter.name.endswith(HEADS))
    ]
    lost = (key for key in source.skipped if not _is_of_the_backbone(source, key, backbone))
    reasons += [f"the run trains '{key}', which a merged model would lose" for key in lost]
    expert = next((parameter.name for parameter in source.parameters if is_expert(parameter.name)), None)
    if expert is not None:
        reasons.append(f"'{expert}' is one of the fused experts of target_parameters")
    if built is None and (config.get("fan_in_fan_out") or backbone.config().get("model_type") in TRANSPOSED):
        reasons.append("linear layers that are stored transposed can be told from others by transformers only")
    if reasons:
        raise CheckpointError(f"{reasons[0]}; use the applier 'peft-adapter'", kind="checkpoint-unsupported-adapter")


def _is_of_the_backbone(source: PeftAdapterSource, key: str, backbone: ModelFiles) -> bool:
    """Whether a tensor is a copy of the backbone's: PEFT saves embeddings and heads along if they have an adapter."""
    if not key.endswith(f"{BASE_LAYER}.weight"):
        return False
    name = key.removeprefix(PREFIX).replace(BASE_LAYER, "")
    saved = source.stored(key, source.steps[-1])
    return backbone.shapes.get(name) == tuple(saved.shape) and torch.equal(backbone.read(name), saved)
