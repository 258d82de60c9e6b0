"""A model that is training, as jumps see it: read, changed and restored in every process that holds a part of it."""

import itertools
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from next_core.errors import BackendError, describe, no_history
from next_core.live_weights.kept_state import KeptState
from next_core.live_weights.processes import Processes, everywhere
from next_core.live_weights.trained_weights import TrainedWeights, WholeWeights
from next_core.storage.atomic import disk_operation


class Kept:
    """A handle of weights and moments that a ``LiveModel`` keeps for as long as the handle exists."""

    def __init__(self, number: int) -> None:
        self.number = number


class LiveModel:
    """A model and its trained weights. In a run of several processes each has one, and process 0 uses its own."""

    def __init__(
        self, model: nn.Module, weights: TrainedWeights | None = None, processes: Processes | None = None
    ) -> None:
        self.model: Any = model
        self.weights = WholeWeights(model) if weights is None else weights
        self.processes = processes
        self._states: dict[int, KeptState] = {}
        self._handles: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        if processes is not None:
            processes.register(self)

    @property
    def _rank(self) -> int:
        return 0 if self.processes is None else self.processes.index

    @everywhere
    def read(self, *names: str) -> dict[str, Tensor]:
        """Return copies of whole trained weights on the CPU, by default of all; in the other processes nothing."""
        found = {}
        for name in names or self.weights.parameters:
            value = self.weights.read(name)
            if self._rank == 0:
                found[name] = value.to("cpu", copy=True)
        return found

    @everywhere
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Replace whole trained weights by name."""
        self.weights.write(values)

    def keep(self) -> Kept:
        """Keep all trained weights and the optimizer's moments."""
        handle = Kept(next(self._numbers))
        self._keep(handle.number, tuple(self._handles))
        self._handles[handle.number] = handle
        return handle

    @everywhere
    def _keep(self, number: int, wanted: tuple[int, ...]) -> None:
        self._states = {old: state for old, state in self._states.items() if old in wanted}
        self._states[number] = KeptState.of(self.weights)

    @everywhere
    def restore(self, kept: Kept) -> None:
        """Restore what was kept."""
        self._states[kept.number].restore(self.weights)

    @everywhere
    def save_kept(self, kept: Kept, folder: Path) -> None:
        """Write what was kept into ``folder``, which all processes can write to: a file for each."""
        tensors = {name: value.contiguous() for name, value in self._states[kept.number].tensors()}
        file = kept_file(folder, self._rank)
        if tensors:
            with disk_operation("writing the weights from before the jump to", file):
                save_file(tensors, file)

    def restore_saved(self, folder: Path) -> None:
        """Restore what ``save_kept`` wrote. Raises ``CheckpointError`` if it is missing or of other processes."""
        kept = Kept(next(self._numbers))
        self._load(kept.number, folder)  # a file that one process lacks has to be found before all of them communicate
        self.restore(kept)

    @everywhere
    def _load(self, number: int, folder: Path) -> None:
        file = kept_file(folder, self._rank)
        try:
            self._states[number] = KeptState.from_tensors(load_file(file) if self.weights.shards else {}, self.weights)
        except Exception as error:
            raise no_history(
                f"{file} does not hold this run's weights from before the jump ({describe(error)}); resume with as "
                "many processes as before, or from another checkpoint"
            ) from error

    @everywhere
    def change_adapters(self, change: Any, *arguments: Any) -> Any:
        """Call ``change(model, *arguments)``, which adds or removes frozen adapters. Returns what that returned."""
        answer = change(self.model, *arguments)
        self.weights.adapters_changed()
        return answer

    def parameter(self, path: str, other: str) -> str:
        """Return which of two names of a trained weight the model has. Raises ``BackendError``."""
        found = next((name for name in (path, other) if name in self.weights.parameters), None)
        if found is None:
            raise BackendError(
                f"'{path}' is missing in the live model; use the checkpoints of this model",
                kind="checkpoint-other-model",
            )
        return found


def kept_file(folder: Path, rank: int, name: str = "before") -> Path:
    """Return the file of one process in a folder of kept weights."""
    return folder / (f"{name}.safetensors" if rank == 0 else f"{name}-{rank}.safetensors")
