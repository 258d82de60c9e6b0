"""Trains tiny models under verl's FSDP in two processes, and saves and loads them by verl's own checkpoint manager.

``saver.py save OUT`` trains three steps of each kind and saves each. ``saver.py load OUT`` loads OUT/KIND-jumped.
Next to each checkpoint that was saved or loaded, ``truth-NAME.safetensors`` has the whole weights,
Adam's moments and the logits as these processes had them in memory, gathered by torch.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from transformers import AutoModelForCausalLM
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy, get_shard_placement_fn

KINDS: dict[str, dict[str, Any]] = {
    "fsdp2": {"hf": True},
    "tied": {"base": "tied_base", "hf": True},
    "columns": {"columns": True},
    "hybrid": {"mesh": (2, 1)},
    "fsdp1": {"fsdp1": True},
    "lora": {"lora": True, "hf": True},
    "lora_only": {"lora": True, "only": True},
    "fsdp1_lora": {"lora": True, "fsdp1": True},
}
STEPS = (10, 20, 30)
IDS = torch.randint(3, 30, (4, 8), generator=torch.Generator().manual_seed(0))


class Run:
    """One model under FSDP with its optimizer and verl's manager."""

    def __init__(self, base: Path, how: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if how.get("lora"):
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, config)
        shape = how.get("mesh", (2,))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp")[-len(shape) :])
        if how.get("fsdp1"):
            policy = get_fsdp_wrap_policy(self.model, config=None, is_lora=bool(how.get("lora")))
            self.model = FullyShardedDataParallel(
                self.model,
                auto_wrap_policy=policy,
                device_id=torch.device("cpu"),
                device_mesh=mesh,
                sharding_strategy=ShardingStrategy.FULL_SHARD,
            )
        else:
            more = {"shard_placement_fn": get_shard_placement_fn(2)} if how.get("columns") else {}
            apply_fsdp2(self.model, {"mesh": mesh, **more}, {})
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        contents = ["model", "optimizer", "extra"]
        saved = [*contents, "hf_model"] if how.get("hf") else contents
        checkpoint = {"save_contents": saved, "load_contents": contents, "save_lora_only": bool(how.get("only"))}
        self.manager = FSDPCheckpointManager(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=torch.optim.lr_scheduler.ConstantLR(self.optimizer),
            checkpoint_config=OmegaConf.create(checkpoint),
        )

    def step(self) -> None:
        self.model(input_ids=IDS, labels=IDS).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def truth(self, path: Path) -> None:
        """Write what is in memory, gathered by torch."""
        whole = StateDictOptions(full_state_dict=True)
        tensors: dict[str, Tensor] = dict(get_model_state_dict(self.model, options=whole))
        for name, state in get_optimizer_state_dict(self.model, self.optimizer, options=whole)["state"].items():
            tensors |= {f"adam.{name}.{key}": torch.as_tensor(value) for key, value in state.items()}
        with torch.no_grad():
            tensors["logits"] = self.model(input_ids=IDS).logits
        if dist.get_rank() == 0:
            save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def main(action: str, out: Path) -> None:
    dist.init_process_group("gloo")
    for kind, how in KINDS.items():
        run, root = Run(out / how.get("base", "base"), how), out / kind
        root.mkdir(exist_ok=True)
        if action == "save":
            for step in STEPS:
                run.step()
                run.manager.save_checkpoint(str(root / f"global_step_{step}" / "actor"), global_step=step)
                run.truth(root / f"truth-{step}.safetensors")
            (root / "latest_checkpointed_iteration.txt").write_text(str(STEPS[-1]))
        else:
            run.manager.load_checkpoint(str(out / f"{kind}-jumped" / f"global_step_{STEPS[-1]}" / "actor"))
            run.truth(root / "truth-loaded.safetensors")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
