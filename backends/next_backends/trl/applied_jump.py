"""A jump in a live trainer, and how it is undone: at once, steps later, or by a resumed process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from next_backends.trl.tensors import on_cpu
from next_core.interfaces import Applied
from next_core.live_weights.in_memory import InMemoryApplied, remove_adapter
from next_core.sources.tensor_files import SafetensorsFile

BEFORE_FILE = "before.safetensors"
"""In a jump's folder: the trained weights and the optimizer's moments from before the jump."""

State = dict[Any, dict[str, Any]]


class TrlApplied(Applied):
    """A jump of this process. Keeps all trained weights and optimizer moments from before it."""

    def __init__(self, model: nn.Module, optimizer: Any, live: InMemoryApplied, folder: Path) -> None:
        self.folder = folder
        self._live, self._optimizer = live, optimizer
        # The applier has kept these already, also where a tied parameter shares their values.
        written = {parameter.data_ptr() for parameter, _ in live.kept}
        trained = [p for p in model.parameters() if p.requires_grad and p.data_ptr() not in written]
        self._kept = [(parameter, parameter.detach().clone()) for parameter in trained]
        self._state: State = {
            parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    @torch.no_grad()
    def rollback(self) -> None:
        self._live.rollback()
        for parameter, kept in self._kept:
            parameter.copy_(kept)
        for parameter, state in self._optimizer.state.items():
            for key, value in self._state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value

    def save(self, model: nn.Module, target: Path) -> None:
        """Write what a rollback restores, so that a resumed run can do it."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors = {f"weight/{names[id(parameter)]}": kept for parameter, kept in (*self._kept, *self._live.kept)}
        for parameter, state in self._state.items():
            name = names[id(parameter)]
            tensors |= {f"{key}/{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        save_file(on_cpu(tensors), target)


class StoredApplied(Applied):
    """A jump of an earlier process, undone from the files in its folder."""

    def __init__(self, model: Any, optimizer: Any, folder: Path, adapter: str | None) -> None:
        self.folder = folder
        self._model, self._optimizer, self._adapter = model, optimizer, adapter

    @torch.no_grad()
    def rollback(self) -> None:
        file = SafetensorsFile(self.folder / BEFORE_FILE)
        parameters = dict(self._model.named_parameters())
        for path in file.shapes:
            key, _, name = path.partition("/")
            value, parameter = file.read(path), parameters[name]
            (parameter if key == "weight" else self._optimizer.state[parameter][key]).copy_(value)
        if self._adapter is not None:
            remove_adapter(self._model, self._adapter)
