"""The trained tensors of a live model by the names in their files, and the files."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from next_core.live_weights.frozen_adapters import is_peft, trained_adapter
from next_core.live_weights.live_model import LiveModel
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.hf_model import SINGLE
from next_core.storage.atomic import disk_operation, new_directory


def live_tensors(live: LiveModel) -> dict[str, Tensor]:
    """Return copies of what a checkpoint of ours holds: the trained adapter, or every trained parameter."""
    model, tensors = live.model, live.read()
    if not is_peft(model):
        return tensors
    adapter = trained_adapter(model)
    factors = _factors(tensors, adapter)
    if len(factors) == len(tensors):
        return factors
    # Embeddings, biases or whole modules train too: PEFT knows how it names them.
    from peft import get_peft_model_state_dict

    # LoRA embedding layers are saved as factors; the frozen matrices below belong to the backbone.
    held = {**model.state_dict(), **tensors}
    state = get_peft_model_state_dict(model, held, adapter_name=adapter, save_embedding_layers=False)
    return {name: value.detach().clone() for name, value in state.items()}


def adapter_config(model: Any, adapter: str) -> str:
    """Return PEFT's config of one adapter as JSON."""
    return json.dumps(model.peft_config[adapter].to_dict(), default=_jsonable, indent=1)


def jump_tensors(model: Any, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of a frozen jump adapter by their names in PEFT's file."""
    return _factors(dict(model.named_buffers()), adapter)


def _factors(tensors: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Return an adapter's factors among a model's tensors, by their names in PEFT's file."""
    suffix = f".{adapter}.weight"
    return {
        name.removesuffix(suffix) + ".weight": value.detach()
        for name, value in tensors.items()
        if name.endswith(suffix) and (".lora_A." in name or ".lora_B." in name)
    }


def write_checkpoint(target: Path, tensors: dict[str, Tensor], config: str | None) -> None:
    """Write one checkpoint folder: an adapter with its config, or a model's parameters. Raises ``StorageError``."""
    with disk_operation("writing the checkpoint", target), new_directory(target, overwrite=True) as folder:
        if config is not None:
            (folder / CONFIG_FILE).write_text(config)
        save_file(tensors, folder / (SINGLE if config is None else WEIGHTS_FILE), metadata={"format": "pt"})


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
