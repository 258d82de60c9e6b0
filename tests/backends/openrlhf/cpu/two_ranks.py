"""What our hooks write into DeepSpeed and read from it, as one of two ranks: two_ranks.py STAGE FOLDER.

Runs in OpenRLHF's environment, without OpenRLHF, Ray and vLLM. One matrix is so much larger than the others that what
does not wait for it is sure to read it too early.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "backends" / "next_backends" / "openrlhf" / "trainer_side"))

import deepspeed  # noqa: E402
import lora  # noqa: E402
import policy  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

SIZES = {"large": (2048, 2049), "small": (7, 2048), "odd": (3, 7)}
"""Shapes; parts of the last two are padded."""
SCALING = 2.0


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in SIZES.items():
            self.add_module(name, torch.nn.Linear(columns, rows, bias=name == "small"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in SIZES:
            x = getattr(self, name)(x)
        return x


def make(stage: int) -> Any:
    """What our hooks are called with."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=list(SIZES), init_lora_weights=False)
    model = get_peft_model(Net(), settings).bfloat16()
    config = {
        "train_batch_size": torch.distributed.get_world_size(),
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    return SimpleNamespace(actor=SimpleNamespace(model=engine), actor_optim=optimizer)


def train(actor: Any) -> None:
    engine = actor.actor.model
    x = torch.randn(4, SIZES["large"][1], dtype=torch.bfloat16)
    engine.backward(engine(x).float().square().mean())
    engine.step()


def masters(actor: Any) -> dict[str, torch.Tensor]:
    return {name: policy._master(p).clone() for name, p in policy._trained(actor.actor.model.module)}


def merged(actor: Any) -> dict[str, torch.Tensor]:
    return {
        name: weight.detach().clone() for name, weight in lora._merged(actor.actor.model.module) if "bias" not in name
    }


def expected(base: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the engines, from the files alone."""
    found = {}
    stored = {key: value.bfloat16().float() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    for name in SIZES:
        A, B = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        found[f"{name}.weight"] = base[f"{name}.weight"] + SCALING * B @ A
    return found


def check_engines(actor: Any, base: dict[str, torch.Tensor], folder: Path) -> None:
    found = merged(actor)
    for name, value in expected(base, folder).items():
        torch.testing.assert_close(found[name].float(), value, rtol=2**-6, atol=2**-6, msg=name)


def main(stage: int, folder: Path) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    base = {key: value.bfloat16().float() for key, value in Net().state_dict().items()}
    actor = make(stage)
    torch.manual_seed(rank)
    train(actor)
    first, other = folder / "first", folder / "other"
    first.mkdir(exist_ok=True)
    other.mkdir(exist_ok=True)
    before = masters(actor)
    policy.save(actor, str(first))
    policy.save_moments(actor, str(folder / "moments.safetensors"))
    torch.distributed.barrier()
    check_engines(actor, base, first)
    for _ in range(2):
        train(actor)
    policy.save(actor, str(other))
    torch.distributed.barrier()
    check_engines(actor, base, other)
    for source in (first, other) * 3:
        policy.load(actor, str(source), [], [], None, None)
        check_engines(actor, base, source)
    policy.load(actor, str(first), [], [], str(folder / "moments.safetensors"), None)
    after = masters(actor)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    policy.save_moments(actor, str(folder / "again.safetensors"))
    torch.distributed.barrier()
    again, kept = (load_file(folder / f"{name}.safetensors") for name in ("again", "moments"))
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[key], value) for key, value in kept.items())
    train(actor)

    real = policy._set

    def half_way(parameter: Any, value: torch.Tensor) -> None:
        """One rank's half-precision weights are not what is trained."""
        real(parameter, value)
        if rank == 1:
            (parameter.ds_tensor if stage == 3 else parameter.data).add_(1)

    policy._set = half_way
    ranks = "rank 0, .* on rank 1" if stage == 3 else "rank 1"
    try:
        policy.load(actor, str(first), [], [], None, None)
        said = ""
    except RuntimeError as error:
        said = str(error)
    assert re.search(f"'base_model.model.large.lora_A.weight' on {ranks}$", said), said
    policy._set = real
    policy.load(actor, str(first), [], [], None, None)
    check_engines(actor, base, first)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    print("all is well", flush=True)
