"""fp32 masters of a run that DeepSpeed trained with ZeRO, in place of the bf16 weights it stored beside them.

DeepSpeed's own ``zero_to_fp32`` puts them together. It unpickles without restriction, so its checkpoints can run code:
read none that a stranger made.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from next_core.errors import CheckpointError, ConfigError
from next_core.sources.tensor_files import TensorFile
from next_core.storage.manifest import check_contents

OPTIMIZER_FILES = "*_optim_states.pt"
READER = "deepspeed.utils.zero_to_fp32"
KEPT = 3
"""Checkpoints whose masters are held at once: the two of a delta, and the one of the next."""


def zero_folder(folder: Path, step: int) -> Path:
    """Where DeepSpeed keeps the optimizer's state of a checkpoint. Raises ``CheckpointError`` when it is not there.

    That is ``_actor/global_stepN`` beside OpenRLHF's ``global_stepN_hf``, or ``global_stepN`` in a trainer's folder.
    """
    places = (folder.parent / "_actor" / f"global_step{step}", folder / f"global_step{step}")
    for place in places:
        if any(place.glob(OPTIMIZER_FILES)):
            return place
    raise CheckpointError(
        f"{folder} has no fp32 masters: no {OPTIMIZER_FILES} in {places[0]} or {places[1]}; open it without masters"
    )


class Masters:
    """Reads the masters of checkpoints, and holds those of the last ``KEPT``: fp32, all that was trained.

    Raises ``ConfigError`` when pickles are not allowed, or DeepSpeed is not installed.
    """

    def __init__(self, allow_pickle: bool) -> None:
        if not allow_pickle:
            raise ConfigError(
                "masters=True reads DeepSpeed's optimizer states, pickles that can run code; trust them with "
                "allow_pickle=True as well (--allow-pickle)"
            )
        try:
            self._read: Any = importlib.import_module(READER).get_fp32_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise ConfigError(f"masters=True needs DeepSpeed ({error}): pip install deepspeed") from None
        self._held: OrderedDict[Path, Mapping[str, Tensor]] = OrderedDict()

    def of(self, place: Path) -> Mapping[str, Tensor]:
        """Masters by the names that the trainer's model has."""
        if place not in self._held:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # it reports by print
                    found = self._read(str(place.parent), tag=place.name, exclude_frozen_parameters=True)
            except Exception as error:  # what it raises for a damaged checkpoint is anybody's guess
                raise CheckpointError(f"{place}: DeepSpeed cannot read it ({error}); restore it") from None
            self._held[place] = found
            while len(self._held) > KEPT:
                self._held.popitem(last=False)
        self._held.move_to_end(place)
        return self._held[place]


def reader(masters: bool, allow_pickle: bool) -> Callable[[Path, int], Callable[[TensorFile], TensorFile]]:
    """For a checkpoint's folder and step, what is to stand in the place of its files: they themselves, or masters."""
    if not masters:
        return lambda folder, step: lambda file: file
    held = Masters(allow_pickle)

    def of(folder: Path, step: int) -> Callable[[TensorFile], TensorFile]:
        place = zero_folder(folder, step)
        return lambda file: MastersFile(file, place, held)

    return of


class MastersFile(TensorFile):
    """A file of weights with the masters in place of what is stored; names and shapes are the file's."""

    def __init__(self, file: TensorFile, place: Path, masters: Masters) -> None:
        super().__init__(file.path)
        self.shapes = file.shapes
        self.place = place
        self._file, self._masters = file, masters

    def settled_by(self) -> list[Path]:
        return [*self._file.settled_by(), *sorted(self.place.glob("*.pt"))]

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if self._file.dtype(key).is_floating_point else self._file.dtype(key)

    def verify(self) -> None:
        super().verify()
        for path in sorted(self.place.glob("*.pt")):
            check_contents(path)

    def _values(self, key: str, rows: slice | None) -> Tensor:
        """The master; what is stored where there is none, as of a frozen parameter.

        Raises ``CheckpointError`` when the two are further apart than rounding takes them.
        """
        stored, found = self._file.raw(key, rows), self._masters.of(self.place)
        master = found.get(key, found.get(key.replace(".weight", ".default.weight") if ".lora_" in key else key))
        if master is None or not stored.is_floating_point():
            return stored
        if tuple(master.shape) != self.shapes[key]:
            raise CheckpointError(
                f"{self.place}: '{key}' is {tuple(master.shape)} but {self.shapes[key]} in {self.path}"
            )
        part = master.float() if rows is None else master[rows].float()
        facts = torch.finfo(stored.dtype)
        if not torch.allclose(part, stored.float(), rtol=2 * facts.eps, atol=facts.tiny):
            raise CheckpointError(f"{self.place}: '{key}' is not what {self.path} stores; are they of one step?")
        return part
