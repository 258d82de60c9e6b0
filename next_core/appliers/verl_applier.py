"""The prediction as a checkpoint that verl resumes from: the newest one's files, with the jump in the shards."""

import shutil
from pathlib import Path

from next_core.appliers.folder_applier import FolderApplier, WrittenFolder, checked_target
from next_core.appliers.folder_contents import CARD, WEIGHT_SUFFIXES, facts_of, record_texts, write_texts
from next_core.appliers.merged_model import ModelWriter, RoundingConfig
from next_core.appliers.merged_tensors import TensorPlan, jumped_blocks
from next_core.appliers.rounding import Rounder, RoundingLoss
from next_core.errors import contradiction, other_model
from next_core.interfaces import CheckpointSource, CoefficientUpdate, Prediction
from next_core.interfaces.prediction import resolve
from next_core.interfaces.weight_delta import FactorStep
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.adapter_tensors import PlainFile
from next_core.sources.fsdp_shards import ADAPTER_KEY, CONFIGS, ShardedFile, has_shards, open_shards, shards_folder
from next_core.sources.hf_model import ModelFiles
from next_core.sources.layouts import TRACKERS, step_folder
from next_core.sources.matrices import place_in_stack

EXPORTED = "lora_adapter"
"""An adapter that older versions of verl exported next to the shards; like exported models it is not copied."""


class VerlApplier(FolderApplier):
    """Writes ``global_step_N`` with the newest checkpoint's optimizer, scheduler and data states, and moved weights.

    Each matrix is rounded to the precision of the shards, and cut as they are. The step stays that of the newest
    checkpoint, since all other states are of it. LoRA: the factors move, so the prediction must be in factor space.
    """

    name = "verl"
    config_class = RoundingConfig

    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        target = checked_target(source, out, dry_run=dry_run)
        actor = actor_folder(source, max(source.steps, default=0))
        file = open_shards(actor, getattr(source.config, "allow_pickle", False))
        if isinstance(source, PeftAdapterSource):
            shards = PlainFile(file, ADAPTER_KEY)
            for module in (module for module in source.modules if module.moves):
                found = [shards.shapes.get(key) for key in module.keys]
                if found != [(module.rank, module.shape[1]), (module.shape[0], module.rank)]:
                    raise other_model(f"{actor} does not hold the factors of '{module.name}' as they were read")
        else:
            files = ModelFiles(actor, allow_pickle=True)
            TensorPlan(source, files).check(files)
        return target

    def check(self, prediction: Prediction, out: str | Path) -> Path:
        target = super().check(prediction, out)
        for name, update in prediction.updates.items():
            factors = isinstance(update, CoefficientUpdate) and update.space == "factors"
            if not factors and not prediction.source.stores_full_weights:
                raise contradiction(
                    f"the jump of '{name}' is not one of its LoRA factors, which are all that verl's shards can hold; "
                    "use a predictor in space=factors, such as secant, or the applier 'peft-adapter'"
                )
        return target

    def needed(self, prediction: Prediction) -> int:
        step = actor_folder(prediction.source, prediction.step).parent
        return sum(path.stat().st_size for path in step.rglob("*") if path.is_file())

    def write(self, prediction: Prediction, alpha: float, folder: Path) -> WrittenFolder:
        source, step = prediction.source, prediction.step
        actor = actor_folder(source, step)
        trackers = [name for name in TRACKERS if (actor.parents[1] / name).exists()] or TRACKERS[:1]
        copied = folder / actor.parent.name / actor.name
        shutil.copytree(actor.parent, copied.parents[0], ignore=_exported, copy_function=shutil.copyfile)
        shards = open_shards(copied, allow_pickle=True, writable=True)
        if isinstance(source, PeftAdapterSource):
            loss = self._write_factors(prediction, alpha, source, shards)
        else:
            loss = self._write_weights(prediction, alpha, copied, shards)
        for name in trackers:
            (folder / name).write_text(str(step))
        facts = facts_of(prediction, alpha, self, loss)
        write_texts(folder, record_texts(facts, folder / CARD, "verl"))
        return WrittenFolder(folder, facts, loss.shares())

    def _write_factors(
        self, prediction: Prediction, alpha: float, source: PeftAdapterSource, shards: ShardedFile
    ) -> RoundingLoss:
        plain, loss = PlainFile(shards, ADAPTER_KEY), RoundingLoss()
        moving = [module for module in source.modules if module.moves]
        for done, module in enumerate(moving, 1):
            name = module.parameters[0].name
            moved, now = resolve(prediction, name, alpha), source.factors(name, prediction.step)
            steps = (moved.dA, moved.dB) if isinstance(moved, FactorStep) else (None, None)
            for key, value, delta in zip(module.keys, (now.A, now.B), steps, strict=True):
                rounder = Rounder(self.config.rounding, plain.dtype(key), self.config.seed, key)
                blocks = jumped_blocks(key, tuple(value.shape), value.__getitem__, None, delta, rounder, loss)
                shards.write(plain.stored[key], blocks)
            self.report_progress("write shards", done, len(moving))
        return loss

    def _write_weights(self, prediction: Prediction, alpha: float, actor: Path, shards: ShardedFile) -> RoundingLoss:
        # The folder of the copy's configs has no exported weights, so that the shards are what is read there.
        configs = actor / CONFIGS if (actor / CONFIGS).is_dir() else actor
        writer = ModelWriter(self, prediction, alpha, ModelFiles(configs, allow_pickle=True))
        if writer.plan.from_backbone:
            raise other_model(
                f"{actor} stores '{writer.plan.from_backbone[0]}', which the checkpoints as they were read do not; "
                f"move the weights out of {CONFIGS}/, so that the shards are read"
            )
        for done, (key, shape) in enumerate(shards.shapes.items(), 1):
            if writer.plan.computes(key, shards.dtype(key), shape):
                for name, size in writer.plan.parts(key, shape).items():
                    blocks = writer.computed(name, shards.dtype(key), size)
                    shards.write(key, blocks, place_in_stack(name))
            self.report_progress("write shards", done, len(shards.shapes))
        return writer.loss


def actor_folder(source: CheckpointSource, step: int) -> Path:
    """Return the folder with the shards of a checkpoint. Raises ``ConfigError`` where there are none."""
    place = (source.adapter(step) if isinstance(source, PeftAdapterSource) else source.model(step)).folder
    actor = next((shards_folder(each) for each in (place, place.parent) if has_shards(each)), None)
    if actor is None or step_folder(actor.parent) is None:
        raise contradiction(
            f"the applier 'verl' needs the shards of a verl run (global_step_N/actor/model_world_size_W_rank_R.pt), "
            f"and {place} has none; use '{source.applier}'"
        )
    return actor


def _exported(folder: str, names: list[str]) -> list[str]:
    """Return what is not copied: weights that were exported from the shards, which would be those before the jump."""
    if Path(folder).name != CONFIGS:
        return [name for name in names if name == EXPORTED]
    return [name for name in names if Path(name).suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")]
