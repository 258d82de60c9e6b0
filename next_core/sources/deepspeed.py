"""fp32 masters of a run that DeepSpeed trained with ZeRO, instead of the bf16 weights stored with them.

DeepSpeed's own ``zero_to_fp32`` assembles them. It unpickles without restriction, so its checkpoints can run code: read
only your own.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from next_core.errors import CheckpointError, ConfigError, contradiction, damaged, not_found, other_model
from next_core.sources.tensor_files import Place, Replacement, TensorFile, is_unchanged
from next_core.storage.reading import Stamp, stamp

OPTIMIZER_FILES = "*_optim_states.pt"
READER = "deepspeed.utils.zero_to_fp32"
KEPT = 3  # Checkpoints whose masters are in memory: the two of a delta, and the one of the next
Masters = Mapping[str, Tensor]
Stamps = tuple[tuple[Path, Stamp], ...]


def replacement(masters: bool, allow_pickle: bool) -> Callable[[Path, int], Replacement]:
    """Return a function from a checkpoint's folder and step to what replaces its files: nothing, or their masters.

    Raises ``ConfigError`` for masters if pickles are not allowed, or DeepSpeed is not installed.
    """
    if not masters:
        return lambda folder, step: lambda file: file
    if not allow_pickle:
        raise contradiction(
            "masters=True reads DeepSpeed's optimizer states, pickles that can run code; if you trust them, set "
            "allow_pickle=True too (--allow-pickle)"
        )
    try:
        read = importlib.import_module(READER).get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ConfigError(
            f"masters=True needs DeepSpeed ({error}): pip install deepspeed", kind="config-missing-package"
        ) from None
    cached = functools.lru_cache(KEPT)(functools.partial(_read_masters, read))

    def of_checkpoint(folder: Path, step: int) -> Replacement:
        states = states_folder(folder, step)
        return lambda file: MastersFile(file, states, cached)

    return of_checkpoint


def states_folder(folder: Path, step: int) -> Path:
    """Return where DeepSpeed keeps the optimizer states of a checkpoint. Raises ``CheckpointError`` if there are none.

    That is ``_actor/global_stepN`` next to OpenRLHF's ``global_stepN_hf``, or ``global_stepN`` in a trainer's folder.
    """
    places = (folder.parent / "_actor" / f"global_step{step}", folder / f"global_step{step}")
    for place in places:
        if any(place.glob(OPTIMIZER_FILES)):
            return place
    raise not_found(
        f"{folder} has no fp32 masters: no {OPTIMIZER_FILES} in {places[0]} or {places[1]}; open it without masters"
    )


def _read_masters(read: Any, states: Path, _: Stamps) -> Masters:
    """Return the masters of all trained parameters by their names in the trainer's model; stamps are for the cache."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it reports by print
            masters: Masters = read(str(states.parent), tag=states.name, exclude_frozen_parameters=True)
    except Exception as error:  # for a damaged checkpoint it can raise anything
        raise damaged(states, f"cannot be read by DeepSpeed ({error})") from None
    return masters


class MastersFile(TensorFile):
    """A file of weights whose values are replaced by the masters; names and shapes are the file's."""

    def __init__(self, file: TensorFile, states: Path, read: Callable[[Path, Stamps], Masters]) -> None:
        super().__init__(file.path)
        self.shapes = file.shapes
        self._file, self._states, self._read = file, states, read
        self._stamps = tuple((path, stamp(path)) for path in sorted(states.glob("*.pt")) if path.exists())

    def weight_files(self) -> list[Path]:
        return [*self._file.weight_files(), *sorted(self._states.glob("*.pt"))]

    def unchanged(self) -> bool:
        return self._file.unchanged() and all(is_unchanged(*each) for each in self._stamps)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if self._file.dtype(key).is_floating_point else self._file.dtype(key)

    def _values(self, key: str, rows: Place | None) -> Tensor:
        """Return the master, or what is stored if there is none, as for a frozen parameter.

        Raises ``CheckpointError`` if the two differ by more than rounding.
        """
        stored, masters = self._file.raw(key, rows), self._read(self._states, self._stamps)
        master = masters.get(key, masters.get(key.replace(".weight", ".default.weight") if ".lora_" in key else key))
        if master is None or not stored.is_floating_point():
            return stored
        if tuple(master.shape) != self.shapes[key]:
            raise self._differs(f"'{key}' is {tuple(master.shape)} but {self.shapes[key]} in {self.path}")
        part = master.float() if rows is None else master[rows].float()
        facts = torch.finfo(stored.dtype)
        if not torch.allclose(part, stored.float(), rtol=2 * facts.eps, atol=facts.tiny):
            raise self._differs(f"'{key}' is not the value that {self.path} stores; are they of one step?")
        return part

    def _differs(self, problem: str) -> CheckpointError:
        return other_model(f"{self._states}: {problem}")
