"""What our hooks write into DeepSpeed and read from it, as one of two ranks: two_ranks.py STAGE OFFLOAD FOLDER.

Runs in OpenRLHF's environment, without Ray and vLLM. One matrix is so much larger than the others that what does not
wait for it is sure to read it too early. OFFLOAD is "adam" (the optimizer is on the CPU), "sleep" (states leave the GPU
between our calls, as with `vllm.sleep`) or "none".
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[4]
for room in ("openrlhf", "external"):
    sys.path.insert(0, str(ROOT / "backends" / "next_backends" / room / "trainer_side"))

import deepspeed  # noqa: E402
import lora  # noqa: E402
import torch  # noqa: E402
import zero_policy  # noqa: E402
from openrlhf.utils.deepspeed.deepspeed_utils import offload_deepspeed_states, reload_deepspeed_states  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from next_backends.sharding import ZeroWeights  # noqa: E402
from next_core.errors import BackendError  # noqa: E402
from next_core.live_weights.live_model import kept_file  # noqa: E402

SIZES = {"large": (2048, 2049), "small": (7, 2048), "odd": (3, 7)}  # Shapes; parts of the last two are padded
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


def make(stage: int, offload: str) -> Any:
    """What our hooks are called with."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=list(SIZES), init_lora_weights=False)
    model = get_peft_model(Net(), settings).bfloat16()
    place = {"device": "cpu" if offload == "adam" else "none"}
    config = {
        "train_batch_size": torch.distributed.get_world_size(),
        "zero_optimization": {"stage": stage, "offload_optimizer": place},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    return SimpleNamespace(actor=SimpleNamespace(model=engine), actor_optim=optimizer)


class Rank:
    """This rank's policy, asked and trained as OpenRLHF does."""

    def __init__(self, stage: int, offload: str) -> None:
        self.actor, self.sleeps = make(stage, offload), offload == "sleep"
        self.fall_asleep()

    def fall_asleep(self) -> None:
        if self.sleeps:
            offload_deepspeed_states(self.actor.actor.model)

    def wake(self) -> None:
        if self.sleeps:
            reload_deepspeed_states(self.actor.actor.model)

    def ask(self, method: str, *arguments: Any) -> Any:
        self.wake()
        try:
            return zero_policy.on_policy(self.actor, method, *arguments)
        finally:
            self.fall_asleep()

    def train(self, seed: int) -> None:
        self.wake()
        engine = self.actor.actor.model
        torch.manual_seed(10 * seed + torch.distributed.get_rank())
        x = torch.randn(4, SIZES["large"][1], dtype=torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
        self.fall_asleep()

    def state(self, folder: Path) -> dict[str, torch.Tensor]:
        """This rank's masters, moments and step counts."""
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        self.ask("keep", str(folder))
        return load_file(kept_file(folder, torch.distributed.get_rank()))

    def check_engines(self, base: dict[str, torch.Tensor], folder: Path) -> None:
        """What the engines get is what the checkpoint in ``folder`` holds."""
        merged = lora._merged(self.actor.actor.model.module)
        found = {name: weight.detach().clone() for name, weight in merged if "bias" not in name}
        saved = load_file(folder / "adapter_model.safetensors").items()
        stored = {key: value.bfloat16().float() for key, value in saved}
        for name in SIZES:
            A, B = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            expected = base[f"{name}.weight"] + SCALING * B @ A
            torch.testing.assert_close(found[f"{name}.weight"].float(), expected, rtol=2**-6, atol=2**-6, msg=name)


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, different


def check_jumps(rank: Rank, folder: Path) -> None:
    """Weights are saved, loaded, and restored with their moments."""
    torch.manual_seed(0)
    base = {key: value.bfloat16().float() for key, value in Net().state_dict().items()}
    first, other, kept = (folder / name for name in ("first", "other", "kept"))
    for path in (first, other):
        path.mkdir(exist_ok=True)
    rank.train(1)
    rank.ask("save", str(first))
    before = rank.state(kept)
    rank.check_engines(base, first)
    for seed in (2, 3):
        rank.train(seed)
    rank.ask("save", str(other))
    rank.check_engines(base, other)
    for source in (first, other) * 3:
        rank.ask("load", str(source), [], [])
        rank.check_engines(base, source)
    rank.ask("restore", str(kept), [])
    rank.check_engines(base, first)
    check_same(rank.state(folder / "restored"), before)


def check_steps(rank: Rank, folder: Path) -> None:
    """A multiplied step is as many times the plain one; what was kept is restored, moments included."""
    kept = folder / "states"
    rank.ask("follow_steps", [2], str(kept), 0, None)
    start = rank.state(folder / "start")
    moves = []
    for multiple in (1.0, 4.0):
        assert rank.ask("on_steps", "set_multiple", [multiple])["multiple"] == multiple
        rank.train(4)
        rank.ask("on_steps", "after_step", [])
        after = rank.state(folder / "after")
        moves.append({name: after[name] - start[name] for name in start if name.endswith("/weight")})
        rank.ask("on_steps", "undo", [0])
        check_same(rank.state(folder / "undone"), start)
    for name, plain in moves[0].items():
        # A weight below 4 holds its move to within 2**-22; that of the plain step is multiplied.
        torch.testing.assert_close(moves[1][name], 4 * plain, rtol=1e-6, atol=5 * 2**-22, msg=name)
    assert any(bool(plain.abs().max() > 1e-3) for plain in moves[0].values())
    rank.train(5)
    found = rank.ask("on_steps", "after_step", [])
    rank.ask("on_steps", "keep", [1])
    before = rank.state(folder / "last")
    rank.ask("on_steps", "apply_mean", [2])
    rank.ask("on_steps", "replace_back", [])
    check_same(rank.state(folder / "back"), before)
    state = folder / "steps"
    rank.ask("save_steps", str(state))
    assert rank.ask("follow_steps", [2], str(kept), 1, str(state)) is None
    resumed = rank.ask("on_steps", "products", [])
    assert (resumed["multiple"], resumed["kept"], found["kept"]) == (4.0, [0, 1], [0])
    rank.train(6)
    rank.ask("on_steps", "undo", [1])
    check_same(rank.state(folder / "resumed"), before)
    (kept / "step-000001-1.safetensors").unlink(missing_ok=True)  # both ranks do
    assert "the weights of step 1, " in rank.ask("follow_steps", [2], str(kept), 1, str(state))
    assert rank.ask("on_steps", "products", [])["kept"] == [0]


def check_refusal(rank: Rank, folder: Path) -> None:
    """One rank's half-precision weights are not what is trained: all ranks fail."""
    number, real = torch.distributed.get_rank(), ZeroWeights.publish

    def half_way(weights: Any, moments: bool = False) -> None:
        real(weights, moments)
        if number == 1:
            next(iter(weights.parameters.values())).data.add_(1)  # ZeRO-3 keeps small weights gathered

    ZeroWeights.publish = half_way
    try:
        rank.ask("load", str(folder / "first"), [], [])
        said = ""
    except BackendError as error:
        said = str(error)
    ZeroWeights.publish = real
    assert "of 'base_model.model.large.lora_A.default.weight' on rank 1" in said, said
    rank.ask("load", str(folder / "first"), [], [])


def main(stage: int, offload: str, folder: Path) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    rank = Rank(stage, offload)
    check_jumps(rank, folder)
    check_steps(rank, folder)
    check_refusal(rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    print("all is well", flush=True)
