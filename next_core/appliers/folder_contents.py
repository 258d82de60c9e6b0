"""What a written folder holds besides weights: copied files, the model card, and the record of the jump."""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from next_core.appliers.rounding import RoundingLoss
from next_core.interfaces import Prediction, WeightApplier
from next_core.sources.checkpoint_names import shorten
from next_core.sources.hf_model import INDEX
from next_core.storage.json_lines import json_text
from next_core.storage.manifest import MANIFEST

RECORD = "extrapolation.json"
CARD = "README.md"
CHAT_TEMPLATES = "additional_chat_templates"  # The one subfolder that a tokenizer reads
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pkl"}
NOT_COPIED = {MANIFEST, RECORD, CARD, "trainer_state.json", "adapter_config.json", "latest", "zero_to_fp32.py"}
"""Files that describe another folder or belong to a trainer. The model card is written anew."""
TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template\.\w+|vocab\.\w+|merges\.txt|"
    r"spiece\.model|sentencepiece.*|.*\.tiktoken|(pre)?processor_config\.json"
)


def model_files(backbone: Path) -> list[Path]:
    """Return the files of a model folder that belong in a copy with other weights."""
    plain = [
        path
        for path in sorted(backbone.iterdir())
        if path.is_file()
        and path.suffix not in WEIGHT_SUFFIXES
        and path.name not in NOT_COPIED
        and (path.name == INDEX or not path.name.endswith(".index.json"))
    ]
    return plain + _chat_templates(backbone)


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that its tokenizer reads."""
    plain = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and TOKENIZER.fullmatch(path.name)]
    return plain + _chat_templates(checkpoint)


def _chat_templates(folder: Path) -> list[Path]:
    return sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))


def copy_files(files: list[Path], source: Path, target: Path) -> None:
    """Copy files to the same places under ``target``."""
    for path in files:
        to = target / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)


def facts_of(
    prediction: Prediction, alpha: float, applier: WeightApplier, loss: RoundingLoss | None = None
) -> dict[str, Any]:
    """Return the facts that ``extrapolation.json`` and the model card state."""
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
        "moved": len(prediction.moving),
        "moved_share": prediction.moved_share,
        "abstained": len(prediction.abstained),
    }
    if loss is not None:
        facts |= {"rounding": applier.config.rounding, **loss.facts()}
    return facts


def from_backbone(facts: Mapping[str, Any]) -> str:
    """Return a sentence about the matrices that a run of whole models does not store."""
    names = facts["from_backbone"]
    return f"not in the checkpoints, so written as the backbone has them ({len(names)}): {shorten(names)}"


def record_texts(facts: Mapping[str, Any], card: Path, library: str) -> dict[str, str]:
    """Return the text of the record and of the model card, by file name; ``card`` is the card to extend, if any."""
    return {RECORD: json.dumps(json.loads(json_text(dict(facts))), indent=1) + "\n", CARD: _card(facts, card, library)}


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder that nobody else sees yet."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")


def _card(facts: Mapping[str, Any], card: Path, library: str) -> str:
    if card.is_file():  # bytes that are not UTF-8 pass through unchanged
        text = card.read_text(encoding="utf-8", errors="surrogateescape").rstrip()
    else:
        text = f"---\nlibrary_name: {library}\n---"
    lines = [
        "## How these weights were made",
        "",
        f"next-core {facts['next_core']} extrapolated them from the checkpoints of a training run.",
        "",
        f"- start: step {facts['step']}; {facts['horizon']} steps ahead, alpha {facts['alpha']:g}",
        f"- applier `{facts['applier']}`; {facts['moved']} of {facts['parameters']} matrices moved, "
        f"{facts['moved_share']:.1%} of the weights that the run trains",
    ]
    if facts.get("from_backbone"):
        lines.append(f"- {from_backbone(facts)}")
    if facts.get("share_of_jump") is not None:
        lines.append(f"- rounding: {facts['rounding']}; {facts['share_of_jump']:.1%} of the jump is left after it")
    return "\n".join([text, "", *lines, ""])
