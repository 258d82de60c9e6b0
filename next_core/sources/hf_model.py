"""A Hugging Face model folder: its weight files, read one tensor at a time, and what transformers builds from it."""

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from next_core.errors import CheckpointError, damaged, not_found, unsafe_path
from next_core.sources.distributed_files import DISTRIBUTED, open_distributed
from next_core.sources.fsdp_shards import LORA, has_shards, open_shards
from next_core.sources.layouts import MODEL_FILES, MODEL_PICKLES, has_any
from next_core.sources.matrices import HEADS, matrices_in, place_in_stack, stored_name
from next_core.sources.tensor_files import Place, Replacement, TensorFile, is_unchanged, open_tensors, read_json
from next_core.storage.reading import LARGE, Stamp, stamp

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

    def is_tied(self, name: str) -> bool:
        """Return whether a tensor is that of several layers."""
        return self.in_memory(name)[0] in {*self.tied, *self.tied.values()}


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


SINGLE, INDEX = MODEL_FILES
PICKLE_SINGLE, PICKLE_INDEX = MODEL_PICKLES
LONGEST_NAME = 255  # Bytes of a file's name
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed add to the names of parameters."""
PARALLEL = "module."  # What DistributedDataParallel adds, in front of every name
PEFT_NAME = re.compile(r"^base_model\.model\.|\.lora_|\.base_layer\.|\.modules_to_save\.")


class ModelFiles:
    """Names, shapes and tensors of a model folder.

    ``replacement`` may wrap each file that is opened. Raises ``CheckpointError`` for a folder without a model, a
    damaged one, and for pickles (``pytorch_model.bin``) unless these are allowed.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False, replacement: Replacement = lambda file: file) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise not_found(f"the model folder {folder} does not exist")
        present = [name for name in (*MODEL_FILES, *MODEL_PICKLES) if os.path.lexists(folder / name)]
        shard_of: dict[str, str] = {}
        self._index: tuple[Path, Stamp] | None = None
        if present and present[0] in (INDEX, PICKLE_INDEX):
            self._index = folder / present[0], stamp(folder / present[0])
            shard_of = _read_index(folder / present[0])
        if present:
            names = sorted(set(shard_of.values())) or present[:1]
            files = [open_tensors(folder / name, allow_pickle) for name in names]
        elif has_any(folder, DISTRIBUTED):
            files = [open_distributed(folder, allow_pickle)]
        elif has_shards(folder):
            files = [open_shards(folder, allow_pickle)]
        else:
            raise not_found(f"{folder} contains neither {SINGLE} nor {INDEX}, so it is no model folder")
        self.files: list[TensorFile] = [replacement(file) for file in files]
        self._where = {key: (file, key) for file in self.files for key in file.shapes}
        self._check_index(shard_of)
        raw = next(filter(PEFT_NAME.search, self._where), None)
        if raw is not None:
            raise CheckpointError(
                f"{folder} stores '{raw}': a PEFT model's state and not a model's weights; save the adapter by PEFT's "
                f"save_pretrained, or the model after merge_and_unload (verl: put back its {LORA})",
                kind="checkpoint-unsupported-adapter",
            )
        self._unwrap()
        self.shapes = {key: file.shapes[name] for key, (file, name) in self._where.items()}

    def _unwrap(self) -> None:
        """Use the names that the parameters have without the wrappers that a trainer put around the model."""
        parallel = len(PARALLEL) if all(key.startswith(PARALLEL) for key in self._where) else 0
        plain = {key: WRAPPERS.sub("", key[parallel:]) for key in self._where}
        if len(set(plain.values())) < len(plain):
            raise damaged(self.folder, "stores a parameter twice, with and without the name of a wrapper")
        self.renamed = {key: name for key, name in plain.items() if key != name}
        """Names in the files that are not those used here."""
        self._where = {name: self._where[key] for key, name in plain.items()}

    def _check_index(self, shard_of: Mapping[str, str]) -> None:
        """Raise ``CheckpointError`` unless each tensor is in one shard, where the index says."""
        for file in self.files:
            twice = next((key for key in file.shapes if self._where[key][0] is not file), None)
            if twice is not None:
                raise damaged(file.path, f"stores '{twice}', which {self._where[twice][0].path.name} stores too")
        for key, name in shard_of.items():
            found = self._where[key][0].path.name if key in self._where else None
            if found != name:
                elsewhere = f"; {found} has it" if found else ""
                raise damaged(self.folder / name, f"has no '{key}', which the index says it has{elsewhere}")

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, in at least fp32. Raises ``CheckpointError`` for NaN or Inf."""
        file, key = self._stored(name)
        return file.read(key, _place(name, key, rows))

    def raw(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, as stored; its values are not checked."""
        file, key = self._stored(name)
        return file.raw(key, _place(name, key, rows))

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision a tensor is stored in."""
        file, key = self._stored(name)
        return file.dtype(key)

    def weight_files(self) -> list[Path]:
        """Return the files that determine the weights."""
        return [path for file in self.files for path in file.weight_files()]

    def unchanged(self) -> bool:
        """Return whether shards and index on disk are still those that were opened."""
        return all(file.unchanged() for file in self.files) and (self._index is None or is_unchanged(*self._index))

    def _stored(self, name: str) -> tuple[TensorFile, str]:
        found = self._where.get(name) or self._where.get(stored_name(name))
        if found is None:
            raise not_found(f"{self.folder} has no parameter '{name}'")
        return found

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The names and shapes of all stored matrices, those in stacks one by one."""
        return {each: size for name, shape in self.shapes.items() for each, size in matrices_in(name, shape).items()}

    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json``; empty if there is none."""
        path = self.folder / MODEL_CONFIG
        return read_json(path, verify=True) if os.path.lexists(path) else {}

    def declares_tie(self) -> bool | None:
        """Return whether head and embedding share their weights by config or class of the model; None: unknown."""
        config = self.config()
        inner = config.get("text_config")
        default = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
        tied = config.get("tie_word_embeddings", default)
        if isinstance(tied, bool):
            return tied
        built = architecture_of(self.folder)
        heads = [] if built is None else [name for name in built.names if name.endswith(HEADS)]
        return None if built is None or not heads else heads[0] in built.tied

    def tie(self, head: str, embedding: str) -> None:
        """Read one parameter by either of its two names; ``shapes`` then has the embedding's only."""
        one = self._where.get(embedding) or self._where.get(head)
        if one is not None:
            self._where |= {head: one, embedding: one}
            self.shapes.pop(head, None)
            self.shapes[embedding] = one[0].shapes[one[1]]

    def use_name(self, stored: str, name: str) -> None:
        """Call a stored tensor by another name."""
        self.renamed[self._where[stored][1]] = name
        self._where[name] = self._where[stored]
        self.shapes[name] = self.shapes.pop(stored)


def _place(name: str, key: str, rows: slice | None) -> Place | None:
    index = None if name == key else place_in_stack(name)
    return rows if index is None else (index, rows or slice(None))


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path, LARGE, verify=True).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise damaged(path, "has no weight_map of names")
    for name in set(index.values()):
        plain = Path(name).name == name and name not in ("", "..") and name.isprintable()
        if not plain or len(name.encode()) > LONGEST_NAME:
            raise unsafe_path(f"{path} points outside its folder: {name!r}; restore the file")
    return index
