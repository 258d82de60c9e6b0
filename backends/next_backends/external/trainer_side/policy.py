"""A policy in training: its weights in and out, and its optimizer's steps. Runs in every rank of the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core.errors import trainer_failed
from next_core.live_weights.live_model import LiveModel
from next_core.live_weights.optimizer_steps import OptimizerSteps
from next_core.live_weights.processes import Processes, everywhere
from next_core.live_weights.trained_weights import TrainedWeights

FILE = 2**31  # Bytes of one file of a full model
TIMEOUT = 3600.0  # Seconds that a rank waits for the others: rank 0 may write a large model meanwhile


class Policy:
    """One rank's part of the policy. Methods run in rank 0, and those marked ``everywhere`` in all ranks."""

    def __init__(self, model: Any, weights: Callable[[Processes | None], TrainedWeights]) -> None:
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.model = model
        self.processes = Processes(rank, count, TIMEOUT) if count > 1 else None
        self.weights = weights(self.processes)
        self.steps: Steps | None = None
        self.live: LiveModel

    def lead(self, method: str, *arguments: Any) -> Any:
        self.live = LiveModel(self.model, self.weights, self.processes)  # a new one keeps no earlier state in memory
        act = getattr(self, method)
        if self.processes is None:
            return act(*arguments)
        self.processes.register(self)
        return self.processes.lead(f"in '{method}'", act, *arguments)

    def save(self, folder: str) -> None:
        """Write the trained weights as fp32 safetensors: an adapter in PEFT's format, or a model in several files."""
        lora = hasattr(self.model, "peft_config")
        if lora:
            self.model.peft_config["default"].save_pretrained(folder)
        masters = ((_stored(name), self.live.read(name)[name].contiguous()) for name in self.weights.parameters)
        _write(Path(folder), masters, "adapter_model" if lora else "model")

    def keep(self, folder: str) -> None:
        """Write the trained weights and the optimizer's moments: a file for each rank."""
        self.live.save_kept(self.live.keep(), Path(folder))

    @everywhere
    def load(self, folder: str | None, shifts: list[str], adapters: list[str], schedule: int = 0) -> None:
        """Set the trained weights to those of ``folder`` plus ``shifts``, and add frozen ``adapters``.

        ``folder`` None keeps the weights. ``schedule`` advances a new learning-rate schedule by so many optimizer
        steps. Raises ``BackendError`` unless every rank holds what was written.
        """
        self.prepare_load(adapters, schedule)
        if folder is None:
            return
        wanted = Shifted(self.weights.parameters, Path(folder), shifts)
        self.weights.write(wanted)
        refused = [name for name, value in wanted.items() if not self.holds(name, value)]
        found = [refused] if self.processes is None else self.processes.gather(refused, "in 'load'")
        places = [f"'{names[0]}' on rank {rank}" for rank, names in enumerate(found) if names]
        if places:
            raise trainer_failed(f"the trainer did not take the new weights of {', '.join(places)}")

    def prepare_load(self, adapters: list[str], schedule: int) -> None:
        """Do the parts of ``load`` that depend on the trainer's library."""
        raise NotImplementedError

    def holds(self, name: str, value: Tensor) -> bool:
        """Return whether a trained weight, as this rank reads it, is ``value``."""
        found = self.weights.read(name)
        return torch.equal(found, value.to(found))

    def likelihood(self, pairs: list[list[str]]) -> float:
        """Return the mean probability of sampling exactly the answer and the end token."""
        raise NotImplementedError

    def restore(self, folder: str, adapters: list[str]) -> None:
        """Restore what ``keep`` wrote, with these frozen ``adapters``."""
        self.live.restore_saved(Path(folder))
        self.load(None, [], adapters)

    def follow_steps(self, windows: list[int], kept: str, at: int, folder: str | None) -> str | None:
        """Follow the optimizer's steps, after the step ``at``, from the state in ``folder`` if resumed.

        States to return to go into the folder ``kept``. Returns a note of those that are lost.
        """
        self._follow(windows, kept, folder)
        assert self.steps is not None
        return self.steps.replace_lost(at)

    @everywhere
    def _follow(self, windows: list[int], kept: str, folder: str | None) -> None:
        self.steps = Steps(self.weights, Path(kept), windows, self.processes)
        if folder is not None:
            self.steps.load(Path(folder))

    def on_steps(self, method: str, arguments: list[Any]) -> dict[str, Any]:
        """Call a method of the followed steps. Returns its answer as JSON holds it, and what they are at."""
        answer = getattr(self.steps, method)(*arguments)
        found = {name: getattr(self.steps, name) for name in ("multiple", "learning_rate", "kept")}
        return {"value": answer.tolist() if isinstance(answer, Tensor) else None, **found}

    move = on_steps
    """The same for methods that change the weights."""

    def save_steps(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert self.steps is not None
        self.steps.save(Path(folder))


class Steps(OptimizerSteps):
    """``OptimizerSteps`` whose every change is made by rank 0, in all ranks."""

    @everywhere
    def after_step(self) -> None:
        super().after_step()

    @everywhere
    def set_multiple(self, multiple: float) -> None:
        self.multiple = multiple


class Shifted(Mapping[str, Tensor]):
    """The weights of a checkpoint plus shifts, by the model's names, in fp32: one in memory at a time."""

    def __init__(self, names: Mapping[str, Any], folder: Path, shifts: Sequence[str]) -> None:
        self._names, self._stored = names, _opened(sorted(folder.glob("*.safetensors")))
        self._shifts = [_opened([Path(path)]) for path in shifts]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        stored = _stored(name)
        value: Tensor = self._stored[stored].get_tensor(stored).float()
        key = _shift_key(stored)
        for shift in self._shifts:
            if key in shift:
                value = value + shift[key].get_tensor(key)
            for index in range(len(value) if value.dim() == 3 else 0):  # experts move one by one
                if f"{key}[{index}]" in shift:
                    value[index] += shift[f"{key}[{index}]"].get_tensor(f"{key}[{index}]")
        return value


def _opened(paths: Sequence[Path]) -> dict[str, Any]:
    """Return, for each tensor in safetensors files, the open file that holds it."""
    opened: list[Any] = [safetensors.safe_open(path, "pt") for path in paths]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - a file, not a dict


def _stored(name: str) -> str:
    """Return the name of a trained parameter in a checkpoint."""
    return name.replace(".default.weight", ".weight") if ".lora_" in name else name


def _shift_key(name: str) -> str:
    """Return the name of a trained tensor in a jump's shift file."""
    if ".lora_" not in name:
        return name
    module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"{module}.weight.{side}"


def in_parts(tensors: Iterator[tuple[str, Any]], most: int) -> Iterator[list[tuple[str, Any]]]:
    """Yield named tensors in lists of about ``most`` bytes, one in memory at a time: each is emptied after use."""
    part: list[tuple[str, Any]] = []
    size = 0
    for name, tensor in tensors:
        part.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= most:
            yield part
            part.clear()
            size = 0
    if part:
        yield part


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], stem: str) -> None:
    """Write files of limited size, one in memory at a time, with an index if there are several."""
    files: dict[str, str] = {}
    size = 0
    for number, part in enumerate(in_parts(tensors, FILE), start=1):
        file = f"{stem}-{number:05d}.safetensors"
        save_file(dict(part), folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys((name for name, _ in part), file)
        size += sum(value.nbytes for _, value in part)
    if len(names := sorted(set(files.values()))) == 1:
        (folder / names[0]).rename(folder / f"{stem}.safetensors")
    elif names:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
