"""The callback in two processes (DDP, gloo), real trainers: process 0 decides, and both hold the same bits."""

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from next_backends.trl.argument_checks import check_arguments
from next_backends.trl.drift import digests
from next_core import open_checkpoints
from next_core.cycle.journal import JOURNAL, read_journal
from next_core.errors import CheckpointError, Interrupted
from next_core.live_weights.processes import as_ours
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from next_core.storage.manifest import MANIFEST, check_manifest
from tests.backends.trl.launch import Launch
from tests.backends.trl.two_processes import Runs
from tests.errors import raises_kind

pytestmark = [pytest.mark.trl, pytest.mark.processes]
SCRIPT = Path(__file__).with_name("two_processes.py")
JUMPING = ["factors", "merged", "full", "whole", "resumed", "scaled"]
FAILING = ["drifted", "unwritable", "unfollowed", "taken", "unlike", "sharded"]

Seen = dict[str, Any]


class RunsOfTwo(Launch):
    """Two processes that make some runs, and what they left behind."""

    def __init__(self, out: Path, runs: Sequence[str], torchrun: bool = False) -> None:
        super().__init__(out, runs[0], SCRIPT, [str(out), *runs], torchrun=torchrun)
        self.out = out

    def seen(self, run: str, ranks: Sequence[int] = (0, 1)) -> list[Seen]:
        """What each process saw of a run."""
        return [pickle.loads((self.out / f"{run}.rank{rank}.pickle").read_bytes()) for rank in ranks]

    def folder(self, run: str) -> Path:
        return self.out / run / "next-core"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def death(out: Path) -> RunsOfTwo:
    """A run whose process 0 was killed in the probe after its jump, while the other one waited."""
    launch = RunsOfTwo(out, ["zero_dies"])
    assert (out / "zero_dies.at").exists(), launch.log
    shutil.copytree(launch.folder("zero_dies"), out / "zero_dies.left")  # the run is resumed later
    return launch


@pytest.fixture(scope="module")
def runs(out: Path, death: RunsOfTwo) -> RunsOfTwo:
    launch = RunsOfTwo(out, ["plain", "refused", *JUMPING, "survived", *FAILING, "slow"], torchrun=True)
    assert launch.codes == [0], launch.log
    return launch


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[key]) for key, value in one.items())


def same_step(one: Seen, other: Seen) -> bool:
    return same(one["weights"], other["weights"]) and same(one["moments"], other["moments"])


def trained(seen: Seen) -> dict[str, np.ndarray]:
    return {name: value for name, value in seen["weights"].items() if ".jump-" not in name}


def test_observing_and_a_refused_jump_leave_the_plain_run_of_two_processes_bit_for_bit(runs: RunsOfTwo) -> None:
    for mine, plain in zip(runs.seen("refused"), runs.seen("plain"), strict=True):
        assert mine["error"] is None
        assert mine["wrapped"] == plain["wrapped"] == "DistributedDataParallel"
        assert all(same_step(mine["after"][step], plain["after"][step]) for step in range(1, 10))
        assert all(mine["after"][step]["training"] == plain["after"][step]["training"] for step in range(1, 10))
        assert all(map(np.array_equal, mine["random"], plain["random"]))


def test_the_probe_is_called_by_process_0_on_the_model_itself(runs: RunsOfTwo) -> None:
    zero, one = runs.seen("refused")
    assert zero["models"] == ["PeftModelForCausalLM"] * 2
    assert one["models"] == []


@pytest.mark.parametrize("run", JUMPING)
def test_both_processes_hold_the_same_bits_after_every_step(runs: RunsOfTwo, run: str) -> None:
    zero, one = runs.seen(run)
    assert zero["error"] is None
    assert one["error"] is None
    assert zero["adapters"] == one["adapters"]
    assert zero["after"].keys() == one["after"].keys()
    for step, seen in zero["after"].items():
        assert same_step(seen, one["after"][step]), step
    for process in (zero, one):  # a jump draws no random number
        for step, before in process["before"].items():
            assert all(map(np.array_equal, before["random"], process["after"][step]["random"])), step
    moved = [step for step, seen in zero["after"].items() if not same_step(seen, zero["before"][step])]
    wanted = {"factors": [6, 9], "merged": [6, 9], "whole": [6, 9], "resumed": [9]}
    if run == "scaled":  # undone after step 4 and perhaps again, then the mean at the end
        assert (moved[0], moved[-1]) == (4, 11)
    else:
        assert moved == wanted.get(run, [6])
    assert [s for s, seen in one["after"].items() if not same_step(seen, one["before"][s])] == moved


@pytest.mark.parametrize(("run", "alpha"), [("factors", 3.0), ("full", 2.0)])
def test_a_jump_moves_the_matrices_of_both_by_the_coefficients(runs: RunsOfTwo, run: str, alpha: float) -> None:
    for seen in runs.seen(run):
        before, after, earlier = (trained(s) for s in (seen["before"][6], seen["after"][6], seen["before"][3]))
        for name, value in before.items():
            wanted = value + alpha * (value - earlier[name]) if value.ndim == 2 else value
            np.testing.assert_allclose(after[name], wanted, atol=1e-6, rtol=1e-4)


def test_a_late_rollback_brings_weights_and_moments_back_in_both(runs: RunsOfTwo) -> None:
    for seen in runs.seen("whole"):
        assert same(trained(seen["before"][6]), trained(seen["after"][9]))
        assert same(seen["before"][6]["moments"], seen["after"][9]["moments"])
        assert not same(seen["before"][9]["moments"], seen["after"][9]["moments"])
        assert seen["adapters"] == ["default"]


@pytest.mark.parametrize("run", ["factors", "merged"])
def test_checkpoints_jumps_and_journal_are_written_once(runs: RunsOfTwo, run: str) -> None:
    zero, one = runs.seen(run)
    records = read_journal(runs.folder(run) / JOURNAL)
    assert records == zero["journal"]
    assert one["journal"] == []
    jumps = [record["step"] for record in records if record["event"] == "jump"]
    assert [record["event"] for record in records].count("start") == 1
    assert jumps == sorted(set(jumps))
    assert len(jumps) >= 2
    names = sorted(path.name for path in (runs.folder(run) / "jumps").iterdir())
    assert names == [f"{number:04d}" for number in range(1, len(jumps) + 1)]
    steps = zero["after"].keys()
    assert open_checkpoints(runs.folder(run) / "checkpoints").steps == tuple(s for s in steps if s % 3 == 0)


def test_a_checkpoint_of_the_trainer_is_sealed_with_the_parts_of_both(runs: RunsOfTwo) -> None:
    checkpoint = runs.out / "whole" / "checkpoint-8"
    check_manifest(checkpoint, contents=True)
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= set(
        json.loads((checkpoint / MANIFEST).read_text())["files"]
    )


def test_a_run_resumed_in_a_recovery_window_ends_as_the_whole_run(runs: RunsOfTwo) -> None:
    for again, whole in zip(runs.seen("resumed"), runs.seen("whole"), strict=True):
        assert sorted(again["after"]) == [9, 10, 11, 12]
        assert all(same_step(again["after"][step], whole["after"][step]) for step in again["after"])
        assert all(map(np.array_equal, again["random"], whole["random"]))


@pytest.mark.parametrize(
    ("run", "kind", "names"),
    [
        ("drifted", "backend-processes-differ", ["after step 6", "process 1", "q_proj.lora_A"]),
        ("unwritable", "", ["metrics.jsonl"]),
        ("unfollowed", "backend-processes-differ", ["after step 6", "process 1", "MemoryError: no room"]),
        ("taken", "config-other-run", ["refused"]),
        ("unlike", "backend-processes-differ", ["settle=1", "process 0 0"]),
        ("sharded", "backend-unsupported", ["'weight'"]),
    ],
)
def test_an_error_in_one_process_ends_both_alike(runs: RunsOfTwo, run: str, kind: str, names: list[str]) -> None:
    zero, one = runs.seen(run)
    assert zero["error"] == one["error"] is not None
    _, found, message = zero["error"]
    assert found == kind or not kind
    assert all(name in message for name in names), message


def test_a_probe_longer_than_the_time_out_ends_the_run_and_names_the_setting(runs: RunsOfTwo) -> None:
    zero, one = runs.seen("slow")
    name, kind, message = one["error"]
    assert (name, kind) == ("BackendError", "backend-process-lost")
    assert all(part in message for part in ("process 1 waited 10 s for process 0", "after step 6", "ddp_timeout"))
    assert zero["error"] is not None
    assert zero["time_limit"] == 5.0  # a fit is ended, and its jump refused, before the others give up


def test_a_process_that_dies_ends_the_run_and_leaves_it_readable(death: RunsOfTwo) -> None:
    assert all(death.codes)
    assert open_checkpoints(death.out / "zero_dies.left" / "checkpoints").steps == (3, 6)
    records = read_journal(death.out / "zero_dies.left" / JOURNAL)
    assert not [record for record in records if record["event"] == "jump"]
    (survivor,) = death.seen("zero_dies", [1])
    name, kind, message = survivor["error"]
    assert (name, kind) == ("BackendError", "backend-process-lost")
    assert "process 1 lost the others after step 6" in message


def test_a_run_that_lost_a_process_ends_as_the_whole_one_when_it_is_resumed(runs: RunsOfTwo) -> None:
    for again, whole in zip(runs.seen("survived"), runs.seen("whole"), strict=True):
        assert again["error"] is None
        assert sorted(again["after"]) == list(range(5, 13))
        assert all(same_step(again["after"][step], whole["after"][step]) for step in again["after"])


def test_a_run_of_two_processes_is_resumed_by_one_in_its_recovery_window(runs: RunsOfTwo) -> None:
    seen = Runs(runs.out).alone_goes_on()
    assert seen["error"] is None
    assert seen["step"] == 12
    assert seen["adapters"] == ["default"]
    assert seen["time_limit"] == Guards().time_limit
    assert [record["step"] for record in seen["journal"] if record["event"] == "verify"][-1] == 9


def arguments(**fields: Any) -> Any:
    """Of TRL's arguments what is looked at."""
    kind = SimpleNamespace(value=fields.pop("kind", "NO"))
    given = {"deepspeed": None, "fsdp": None, "world_size": 1, "steps_per_generation": 1, "num_iterations": 1}
    return SimpleNamespace(
        **given
        | {"gradient_accumulation_steps": 1, "distributed_state": SimpleNamespace(distributed_type=kind)}
        | fields
    )


def test_weights_that_we_cannot_reach_are_refused_by_name() -> None:
    schedule, guards, secant = Schedule(observe=10, every=5), Guards(), make_predictor("secant")
    for kind in ("MULTI_GPU", "DEEPSPEED", "FSDP"):
        check_arguments(secant, schedule, guards, 20, arguments(world_size=2, kind=kind), several=True)
    with raises_kind("backend-unsupported", "Megatron-LM"):
        check_arguments(secant, schedule, guards, 20, arguments(world_size=2, kind="MEGATRON_LM"), several=True)
    with raises_kind("backend-unsupported", "2 processes", "PredictExtendCallback"):
        check_arguments(secant, schedule, guards, 20, arguments(world_size=2, kind="MULTI_CPU"))


def test_a_digest_tells_the_last_bit_the_place_and_the_chunk() -> None:
    tensor = torch.arange(2**21 + 5, dtype=torch.float32)
    whole = digests({"w": tensor})["w"]
    assert digests({"w": tensor.clone()})["w"] == whole
    for change in (
        lambda t: t[7:8].copy_(torch.nextafter(t[7:8], torch.tensor([1e9]))),
        lambda t: t[:2].copy_(t[:2].flip(0)),
        lambda t: t[: 2**21].copy_(t[: 2**21].roll(2**20)),
        lambda t: t[-1:].neg_(),
    ):
        other = tensor.clone()
        change(other)
        assert digests({"w": other})["w"] != whole
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert digests({"w": half}) != digests({"w": half.flip(0)})
    assert digests({"w": torch.zeros(0)}) == {"w": 0}


def test_an_error_of_process_0_keeps_its_class_and_exit_code_in_the_others() -> None:
    class StrangersError(CheckpointError):
        def __init__(self) -> None:
            super().__init__("torn", kind="checkpoint-damaged")

    sent = pickle.loads(pickle.dumps(as_ours(StrangersError())))
    assert type(sent) is CheckpointError
    assert (sent.message, sent.kind) == ("torn", "checkpoint-damaged")
    ended = pickle.loads(pickle.dumps(as_ours(Interrupted("asked to end", 15))))
    assert (type(ended), ended.message, ended.exit_code) == (Interrupted, "asked to end", 143)
    assert "KeyboardInterrupt" in as_ours(KeyboardInterrupt()).message
