"""What transformers builds from a ``config.json``, without weights: names as it maps them, classes of modules."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from next_core.storage.reading import Stamp, stamp

MODEL_CONFIG = "config.json"
STORED_TRANSPOSED = "Conv1D"
"""The class of transformers' layers that store (in, out), as GPT-2's do; those of torch store (out, in)."""


@dataclass(frozen=True)
class Architecture:
    """A model as transformers holds it in memory.

    ``in_memory`` returns the name that a stored tensor is loaded under, and whether that is the tensor itself and not
    one made of several. ``names`` are those of its tensors, ``conv1d`` those of the weights that are stored (in, out).
    ``tied`` maps each further name of a tensor to the first.
    """

    names: frozenset[str] = frozenset()
    conv1d: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    in_memory: Callable[[str], tuple[str, bool]] = field(default=lambda name: (name, True))

    def is_transposed(self, name: str) -> bool:
        """Return whether a weight is stored (in, out)."""
        return self.in_memory(name)[0] in self.conv1d


def architecture_of(folder: Path) -> Architecture | None:
    """Return what transformers makes of a model folder; None if that needs the folder's code, or is not possible."""
    path = folder / MODEL_CONFIG
    return _built(folder, stamp(path)) if os.path.lexists(path) else None


@functools.lru_cache(8)
def _built(folder: Path, _: Stamp) -> Architecture | None:
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            with torch.device("meta"):
                model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
        finally:
            logging.set_verbosity(verbosity)
        changes = get_model_conversion_mapping(model)
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        renamings = [change for change in changes if not isinstance(change, WeightConverter)]
        tensors = model.state_dict()

        def in_memory(name: str) -> tuple[str, bool]:
            if name in tensors:
                return name, True
            found, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, tensors)
            return found, merged is None

        conv = {name for name, module in model.named_modules() if type(module).__name__ == STORED_TRANSPOSED}
        conv1d = frozenset(f"{name}.weight" for name in conv)
        return Architecture(frozenset(tensors), conv1d, model.all_tied_weights_keys, in_memory)
    except Exception:  # whatever a config makes transformers raise: the model is then read as it is stored
        return None
