"""Whether the processes of a run hold the same bits of what each of them holds as a whole."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from next_core.errors import BackendError
from next_core.live_weights.processes import Processes
from next_core.sources.layouts import JUMP_PREFIX

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


def check_same_weights(processes: Processes, model: nn.Module, where: str) -> None:
    """Raise ``BackendError`` in every process unless all hold the same bits of everything that trains."""
    mine = digests(moving_tensors(model))
    if len(set(processes.gather(hashlib.sha256(repr(mine).encode()).digest(), where))) == 1:
        return
    held = processes.gather(mine, where)
    for other, theirs in enumerate(held):
        names = sorted(name for name in {*held[0], *theirs} if held[0].get(name) != theirs.get(name))
        if names:
            raise BackendError(
                f"{where}, process {other} holds other weights than process 0: '{names[0]}'"
                + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
                + "; something changes the model in one process only. No jump was made; fix that, and resume from a "
                "checkpoint from before",
                kind="backend-processes-differ",
            )


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all that trains, and the jump adapters: what every process has to hold alike, unless it is sharded."""
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if (tensor.requires_grad or (".lora_" in name and f".{JUMP_PREFIX}" in name))
        and not hasattr(tensor, "placements")
        and not hasattr(tensor, "ds_id")
    }


@torch.no_grad()
def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a number for the bits of each tensor and their places: a weighted sum, computed on its device.

    Products and sums wrap around. The weights are odd, hence invertible: no bit of an element is lost. They differ
    within a chunk, and chunks are combined as a polynomial, so that places count too.
    """
    places: dict[torch.device, Tensor] = {}
    sums = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        if bits.device not in places:
            places[bits.device] = 2 * torch.arange(_CHUNK, dtype=torch.int32, device=bits.device) + 1
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for chunk in torch.split(bits, _CHUNK):
            total = total * 1_000_003 + (chunk * places[bits.device][: len(chunk)]).sum(dtype=torch.int64)
        sums.append(total)
    return {name: int(total) for name, total in zip(tensors, sums, strict=True)}
