"""What a written folder takes along besides weights: configuration, tokenizer, custom code, model card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from next_core.sources.hf_model import INDEX
from next_core.storage.manifest import INCOMPLETE, MANIFEST

RECORD = "extrapolation.json"
CARD = "README.md"
CHAT_TEMPLATES = "additional_chat_templates"
"""The one subfolder that a tokenizer reads."""
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pkl"}
NOT_CARRIED = {MANIFEST, INCOMPLETE, RECORD, CARD, "trainer_state.json", "adapter_config.json", "latest"}
"""Of another folder than the one that is written, or of a trainer; the model card is written anew."""
TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template\.\w+|vocab\.\w+|merges\.txt|"
    r"spiece\.model|sentencepiece.*|.*\.tiktoken|(pre)?processor_config\.json"
)
SECTION = "## How these weights were made"


def model_files(backbone: Path, sharded: bool) -> list[Path]:
    """The plain files of a model folder that belong into a copy with other weights."""
    found = []
    for path in sorted(backbone.iterdir()):
        index = path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_CARRIED and not index:
            found.append(path)
    return found + ([backbone / INDEX] if sharded else []) + _chat_templates(backbone)


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that its tokenizer reads."""
    plain = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and TOKENIZER.fullmatch(path.name)]
    return plain + _chat_templates(checkpoint)


def _chat_templates(folder: Path) -> list[Path]:
    return sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))


def copy_files(files: list[Path], source: Path, target: Path) -> None:
    """Copy them to the same places under ``target``."""
    for path in files:
        to = target / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)


def model_card(original: Path | None, facts: Mapping[str, Any], library: str) -> str:
    """The model card, its front matter untouched, and a section that says how the weights were made."""
    if original is not None and original.is_file():
        # Bytes that are not UTF-8 pass through unchanged.
        text = original.read_text(encoding="utf-8", errors="surrogateescape").rstrip() + "\n\n"
    else:
        text = f"---\nlibrary_name: {library}\n---\n\n"
    return text + SECTION + "\n\n" + _sentences(facts) + "\n"


def _sentences(facts: Mapping[str, Any]) -> str:
    lines = [
        f"They were not trained to where they are: next-core {facts['next_core']} extrapolated a training run from its "
        f"checkpoints.",
        "",
        f"- counted from step {facts['step']}, {facts['horizon']} steps ahead, alpha {facts['alpha']:g}",
        f"- applier `{facts['applier']}`; {facts['moved']} of {facts['parameters']} matrices moved",
    ]
    if facts.get("share_of_jump") is not None:
        lines.append(
            f"- rounding to the stored precision: {facts['rounding']}; {facts['share_of_jump']:.1%} of the jump landed"
        )
    return "\n".join(lines)
