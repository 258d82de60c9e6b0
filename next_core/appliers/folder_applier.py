"""What the appliers that write folders share: the target, the record, and one way to write one folder or several."""

from __future__ import annotations

import contextlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from next_core.appliers.copied_files import CARD, RECORD, model_card
from next_core.appliers.rounding_loss import Landed, pooled, shares
from next_core.errors import ConfigError, GuardError, PluginError
from next_core.interfaces import Applied, CheckpointSource, Prediction, WeightApplier
from next_core.storage.atomic import enough_space, new_directory
from next_core.storage.json_lines import json_text

SMALL_FILES = 64 * 2**20
"""Room asked for beside the weights: tokenizer, card, records."""


class WrittenFolder(Applied):
    """A folder that was written; rolling back removes it.

    ``landed`` gives by parameter the share of the jump that is left after rounding, ``share`` that of all of them;
    ``update_share`` counts from the backbone, the training since included (LoRA runs in a merged model). An adapter
    rounds nothing that matters: no figures. ``record`` is what ``extrapolation.json`` says.
    """

    def __init__(self, path: Path, landed: Landed | None = None, record: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.landed: Mapping[str, float] = shares(landed.jump) if landed is not None else {}
        self.share = pooled(landed.jump) if landed is not None else None
        self.update_share = pooled(landed.update) if landed is not None else None
        self.record: Mapping[str, Any] = dict(record or {})

    def rollback(self) -> None:
        shutil.rmtree(self.path)


class ReplacedFolder(WrittenFolder):
    """A folder that was written in place: what was there is gone."""

    def rollback(self) -> None:
        raise ConfigError(f"{self.path} was written in place; what was there before cannot be put back")


@dataclass
class Written:
    """What writing into one folder came to."""

    facts: dict[str, Any]
    landed: Landed | None = None
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 by file name, of the files that were hashed as they were written."""


class FolderApplier(WeightApplier):
    """Writes new folders: to one alpha, or to several in one pass over the matrices."""

    @abstractmethod
    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        """The target; raises ``ConfigError`` for what cannot be written there, whatever is predicted.

        In a ``dry_run`` the target may exist already.
        """

    def check(self, prediction: Prediction, out: str | Path) -> Path:
        """The target; raises ``ConfigError`` for what cannot be written there, and ``PluginError`` when the prediction
        moves a parameter that the run does not have."""
        target = self.check_source(prediction.source, out)
        unknown = set(prediction.updates) - {parameter.name for parameter in prediction.source.parameters}
        if unknown:
            raise PluginError(f"the prediction names '{min(unknown)}', which the run does not have")
        return target

    @abstractmethod
    def needed(self, prediction: Prediction) -> int:
        """Bytes of weights in one folder, at most."""

    @abstractmethod
    def write(self, prediction: Prediction, folders: Mapping[float, Path]) -> dict[float, Written]:
        """Fill an empty folder for each alpha; a weight_delta is computed once for all of them."""

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: str | Path) -> WrittenFolder:
        target = self.check(prediction, out)
        digests: dict[str, str] = {}
        with (
            enough_space(target, self.needed(prediction) + SMALL_FILES),
            outcome(),
            new_directory(target, digests=digests) as folder,
        ):
            written = self.write(prediction, {alpha: folder})[alpha]
            digests.update(written.digests)
        return WrittenFolder(target, written.landed, written.facts)


@contextlib.contextmanager
def outcome(text: str = "nothing was written") -> Iterator[None]:
    """Ends the message of a refused jump with what became of the target."""
    try:
        yield
    except GuardError as error:
        if "nothing was" in str(error):
            raise
        raise GuardError(f"{error}; {text}") from error


def facts_of(
    prediction: Prediction, alpha: float, applier: WeightApplier, landed: Landed | None = None
) -> dict[str, Any]:
    """What ``extrapolation.json`` and the model card say of a folder."""
    facts: dict[str, Any] = {
        "next_core": version("next-core"),
        "layout": prediction.source.name,
        "step": prediction.step,
        "horizon": prediction.horizon,
        "alpha": alpha,
        "anchor": prediction.anchor,
        "applier": applier.name,
        "settings": json.loads(applier.config.model_dump_json(exclude={"backbone"})),
        "parameters": len(prediction.source.parameters),
        "moved": sum(1 for name in prediction.updates if prediction.weight(name) != 0.0),
        "abstained": len(prediction.abstained),
    }
    if landed is not None:
        facts |= {"rounding": applier.config.rounding, **landed.facts()}
    return facts


def record_texts(facts: Mapping[str, Any], card: Path | None, library: str) -> dict[str, str]:
    """The texts that state the facts, by file name: the record and the model card."""
    return {
        RECORD: json.dumps(json.loads(json_text(dict(facts))), indent=1) + "\n",
        CARD: model_card(card, facts, library),
    }


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write them into a folder nobody else sees yet."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")


def checked_target(
    source: CheckpointSource,
    out: str | Path,
    backbone: Path | None = None,
    *,
    in_place: bool = False,
    dry_run: bool = False,
) -> Path:
    """The target folder. Raises ``ConfigError`` when it exists (or does not, where it is to be written ``in_place``),
    or lies on or in what is read for it. In a ``dry_run`` it may exist.
    """
    target = Path(out)
    config = source.config
    # Of a list, path is only a folder above all of them: often the one that people work in.
    checkpoints = getattr(config, "folders", ()) or (getattr(config, "path", None),)
    for read in (*checkpoints, getattr(config, "backbone", None), backbone):
        if read is not None and target.resolve().is_relative_to(Path(read).resolve()):
            raise ConfigError(f"{target} lies in {read}, which is being read; choose a folder outside it")
    if target.exists() and not (in_place or dry_run):
        raise ConfigError(f"{target} exists already; choose another folder or remove it")
    if in_place and not target.is_dir():
        raise ConfigError(f"{target} does not exist; in_place replaces the weights of a model folder that is there")
    return target
