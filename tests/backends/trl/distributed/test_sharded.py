"""Real GRPO in two processes that share the weights' shards: DeepSpeed's ZeRO-1, 2 and 3, and FSDP2, on CPUs (gloo)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, Qwen2ForCausalLM

from next_backends.trl.evaluate import greedy_accuracy
from tests.backends.external.real import python_of
from tests.backends.trl.conftest import BASE
from tests.backends.trl.distributed import oracle
from tests.backends.trl.distributed.cells import JUMP, LORA, low_digits, make_base
from tests.backends.trl.launch import ROOT, Launch

pytestmark = pytest.mark.distributed
CELLS = {
    "factors": (),
    "merged": (),
    "merged_again": ("merged",),
    "full": (),
    "full_again": ("full",),
    "bf16": (),
    "scaled": (),
    "scaled_again": ("scaled",),
    "reward": (),
    "raises": (),
    "dies": (),
}
"""In the order they are run, with those whose checkpoints they resume from."""
MODES = ["zero1", "zero2", "zero3", "fsdp2"]
SCRIPT = Path(__file__).with_name("cells.py")

Seen = dict[str, Any]
Weights = dict[str, Tensor]
REFUSED = ("fsdp2", "merged")


def each(*cells: str, modes: Sequence[str] = MODES) -> Any:
    """Parametrize a test by the modes and cells whose runs it looks at."""
    pairs = [(mode, cell) for mode in modes for cell in cells if (mode, cell.removesuffix("_again")) != REFUSED]
    return pytest.mark.parametrize(("mode", "cell"), pairs)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def seen(out: Path, request: pytest.FixtureRequest) -> Callable[[str, str], list[Seen]]:
    """``seen(mode, cell)``: what each process saw. A mode's cells are run in one start: those that tests ask for."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {(param["mode"], param["cell"]) for param in params if {"mode", "cell"} <= param.keys()}
    asked |= {("none", cell) for _, cell in asked if cell == "scaled"}
    launches: dict[str, Launch] = {}

    def find(mode: str, cell: str) -> list[Seen]:
        if mode not in launches:
            (out / mode).mkdir()
            wanted = {name for at, asks in asked if at == mode for name in (asks, *CELLS[asks])}
            launches[mode] = launch(out, mode, [name for name in CELLS if name in wanted])
        files = [file for rank in (0, 1) if (file := out / mode / f"{cell}.rank{rank}.pt").exists()]
        assert files, launches[mode].log
        return [torch.load(file, weights_only=False) for file in files]

    return find


def launch(out: Path, mode: str, cells: list[str], **more: str) -> Launch:
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "backends", "predictors"))
    more |= {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    return Launch(
        out / mode, "log", SCRIPT, [str(out), mode, *cells], python=python_of("distributed"), more=more, timeout=900
    )


def jumped(seen: Seen) -> Weights:
    """The weights after the jump at step 4: those of its matrices move on by alpha times the last two steps."""
    now, earlier = seen["before"][4]["masters"], seen["before"][2]["masters"]
    return {k: w + JUMP["alpha"] * (w - earlier[k]) if w.ndim == 2 else w for k, w in now.items()}


def merged_move(seen: Seen) -> Weights:
    """The move of the matrices below the adapter: alpha times that of s B A."""
    now, earlier = seen["before"][4]["masters"], seen["before"][2]["masters"]
    scale, moves = JUMP["alpha"] * LORA["lora_alpha"] / LORA["r"], {}
    for name in now:
        if ".lora_A." in name:
            b = name.replace(".lora_A.", ".lora_B.")
            module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            moves[f"{module}.weight"] = scale * (now[b] @ now[name] - earlier[b] @ earlier[name])
    return moves


def unsharded(base: Path, weights: Weights, moves: Weights) -> Any:
    """One model with these trained weights, and ``moves`` added to its matrices."""
    model: Any = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, move in moves.items():
        model.get_parameter(name).data += move
    if any(".lora_" in name for name in weights):
        model = get_peft_model(model, LoraConfig(**LORA))
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    return model


def whole_logits(base: Path, weights: Weights, moves: Weights, half: bool) -> Tensor:
    model = unsharded(base, weights, moves)
    return oracle.logits(model.bfloat16() if half else model)


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def check_close(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


def check_step(start: Weights, after: Seen, count: int) -> None:
    """Adam's ``count``-th step, without weight decay, leads from ``start`` to ``after``."""
    first, second = 1 - 0.9**count, 1 - 0.999**count
    m, v = ({name: after["moments"][f"{key}/{name}"] for name in start} for key in oracle.MOMENTS)
    check_close(
        after["masters"], {k: w - 1e-3 * (m[k] / first) / ((v[k] / second).sqrt() + 1e-8) for k, w in start.items()}
    )


@each("factors", "merged", "full", "bf16")
def test_a_jump_reaches_masters_forward_pass_and_the_next_step(seen: Any, out: Path, mode: str, cell: str) -> None:
    ranks = seen(mode, cell)
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["error"] is None
        assert rank["wrapped"].startswith({"none": "Distributed", "fsdp2": "FSDP"}.get(mode, "DeepSpeedEngine"))
        before, after = rank["before"][4], rank["after"][4]
        moves = merged_move(rank) if cell == "merged" else {}
        wanted = before["masters"] if moves else jumped(rank)
        check_close(after["masters"], wanted)
        half = cell == "bf16" and mode.startswith("zero")
        check_close(after["forward"], {k: w.bfloat16().float() if half else w for k, w in wanted.items()})
        assert same(after["moments"], before["moments"])
        check_step(wanted, rank["before"][5], 5)
        tolerance = 0.05 if cell == "bf16" else 1e-5
        reference = whole_logits(out / "base", wanted, moves, cell == "bf16")
        assert (after["logits"] - before["logits"]).abs().max() > 2 * tolerance
        assert (after["logits"] - reference).abs().max() < tolerance


@each("full", "merged")
def test_a_late_rollback_restores_weights_and_moments_exactly(seen: Any, mode: str, cell: str) -> None:
    for rank in seen(mode, cell):
        before, judged, after = rank["before"][4], rank["before"][6], rank["after"][6]
        assert not same(judged["moments"], after["moments"])
        for what in ("masters", "forward", "moments", "jumps"):
            assert same(after[what], before[what]), what
        assert torch.equal(after["logits"], before["logits"])
        check_step(before["masters"], rank["before"][7], 5)


@each("merged_again", "full_again", "scaled_again")
def test_a_resumed_run_ends_as_the_whole_run(seen: Any, mode: str, cell: str) -> None:
    again, whole = seen(mode, cell), seen(mode, cell.removesuffix("_again"))
    for mine, theirs in zip(again, whole, strict=True):
        assert mine["error"] is None
        assert max(mine["after"]) == max(theirs["after"])
        assert min(mine["after"]) > 5
        for when in ("before", "after"):
            for step, found in mine[when].items():
                check_close(
                    *({"logits": at["logits"]} | at["masters"] | at["jumps"] for at in (found, theirs[when][step]))
                )
        assert scaling(mine) == scaling(theirs)


@pytest.mark.parametrize(("mode", "cell"), [REFUSED])
def test_merged_jumps_are_refused_before_training(seen: Any, mode: str, cell: str) -> None:
    for rank in seen(mode, cell):
        _, kind, message = rank["error"]
        assert kind == "backend-unsupported"
        assert "factors" in message
        assert not rank["before"]


def scaling(seen: Seen) -> list[tuple[Any, ...]]:
    """What step scaling decided; known to process 0 alone."""
    records = [record for record in seen["journal"] if record["event"] in ("scale", "collapse", "average")]
    return [(r["event"], r["step"], r.get("back_to"), r.get("multiple"), r.get("accepted")) for r in records]


@each("scaled")
def test_steps_are_scaled_as_under_plain_ddp(seen: Any, mode: str, cell: str) -> None:
    mine, plain = scaling(seen(mode, cell)[0]), scaling(seen("none", cell)[0])
    multiples = [[record[3] for record in records if record[3] is not None] for records in (mine, plain)]
    assert len({round(multiple, 2) for multiple in multiples[0]}) > 4
    assert multiples[0] == pytest.approx(multiples[1], rel=1e-3)
    assert [(*record[:3], record[4]) for record in mine] == [(*record[:3], record[4]) for record in plain]


@each("scaled")
def test_a_collapse_is_undone_with_its_moments_and_the_run_ends_in_the_mean(seen: Any, mode: str, cell: str) -> None:
    ranks = seen(mode, cell)
    assert ("collapse", 20, 10) in [record[:3] for record in scaling(ranks[0])]
    for rank in ranks:
        assert rank["error"] is None
        for what in ("masters", "forward", "moments"):
            assert same(rank["after"][20][what], rank["after"][10][what]), what
            assert not same(rank["before"][20][what], rank["after"][10][what]), what
        steps = [rank["before"][step]["masters"] for step in range(21, 25)]
        mean = {name: torch.stack([weights[name] for weights in steps]).mean(0) for name in steps[0]}
        check_close(rank["after"][24]["masters"], mean)
        check_close(rank["after"][24]["forward"], mean)


@each("reward", modes=["zero3", "fsdp2"])
def test_the_reward_is_probed_by_all_processes_together(seen: Any, out: Path, mode: str, cell: str) -> None:
    ranks = seen(mode, cell)
    assert [rank["error"] for rank in ranks] == [None, None]
    (jump,) = (record for record in ranks[0]["journal"] if record["event"] == "jump")
    data = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(10, 40) for b in (10, 20)])
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    for key, weights in (("accuracy_before", ranks[0]["before"][4]["masters"]), ("accuracy_after", jumped(ranks[0]))):
        model = unsharded(out / "base", weights, {})
        assert jump[key] == pytest.approx(greedy_accuracy(model, tokenizer, data, low_digits, 4)), key
    assert jump["accuracy_before"] != jump["accuracy_after"]
    for rank in ranks:
        check_step(jumped(rank), rank["before"][5], 5)


@each("raises", modes=["zero3", "fsdp2"])
def test_a_jump_whose_probe_fails_in_one_process_is_rolled_back_in_all(seen: Any, mode: str, cell: str) -> None:
    ranks = seen(mode, cell)
    (failed,) = (record for record in ranks[0]["journal"] if record["event"] == "probe" and "problem" in record)
    assert "process 1" in failed["problem"]
    assert "no such file" in failed["problem"]
    for rank in ranks:
        assert rank["error"] is None
        assert same(rank["after"][4]["masters"], rank["before"][4]["masters"])
        check_step(rank["before"][4]["masters"], rank["before"][5], 5)


@each("dies")
def test_the_death_of_a_process_ends_the_other_with_a_clear_error(seen: Any, mode: str, cell: str) -> None:
    (survivor,) = seen(mode, cell)
    _, kind, message = survivor["error"]
    assert kind == "backend-process-lost"
    assert "process 0 lost the others after step 4" in message
