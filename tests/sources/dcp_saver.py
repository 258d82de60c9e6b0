"""Saves two steps of an FSDP2 model by ``torch.distributed.checkpoint``, in two processes, as four trainers call it.

``dcp_saver.py OUT``. truth-N.safetensors has the whole weights as torch gathers them.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils.fsdp_utils import save_fsdp_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import StateDictType, fully_shard


class State:
    """What NeMo-RL and prime-rl wrap states in: the saver calls ``state_dict``."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


def main(out: Path) -> None:
    PartialState(cpu=True)  # starts gloo
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3).bfloat16())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT, fsdp_version=2, state_dict_config=None)
    for step in (10, 20):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        weights, moments = get_state_dict(model, optimizer)
        save_fsdp_model(
            plugin, SimpleNamespace(process_index=dist.get_rank()), model, out / f"accelerate/checkpoint-{step}"
        )
        dcp.save({"model": State(get_model_state_dict(model))}, checkpoint_id=out / f"nemo/step_{step}/policy/weights")
        app = State({"model": weights, "optimizers": moments, "progress": {"step": step}})
        dcp.save({"app": app}, checkpoint_id=out / f"prime/step_{step}/trainer")
        dcp.save(dict(weights), checkpoint_id=out / f"plain/step-{step}")
        whole = {name: value.full_tensor() for name, value in weights.items()}
        if dist.get_rank() == 0:
            save_file(whole, out / f"truth-{step}.safetensors")
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way


if __name__ == "__main__":
    main(Path(sys.argv[1]))
