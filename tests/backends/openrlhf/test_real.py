"""The real OpenRLHF, driven through the cycle on the embedded arithmetic task. A launch takes about a minute."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from next_backends.external.process import TrainerProcess, leftovers
from next_backends.external.supervisor import TOKEN
from next_backends.external.trainer import Trainer
from next_core.cycle.journal import read_journal
from next_core.cycle.run import run
from next_core.cycle.run_result import RunResult
from next_core.run_config import RunConfig
from tests.backends.external.real import TASK, arithmetic_run, killing, replaced, stored
from tests.errors import raises_kind

pytestmark = pytest.mark.openrlhf

STRENGTH = ["--algo.advantage.is_correction_level", "token", "--algo.advantage.is_correction_threshold", "0.01", "100"]
"""With it the trainer logs ``vllm_kl``: whether the engines sample from the weights that train."""

Config = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def config(openrlhf_backend: Callable[..., dict[str, Any]]) -> Config:
    """A run of six steps with a jump after the third; keywords replace blocks or go into them."""

    def make(**changes: Any) -> RunConfig:
        data = {split: str(TASK / f"{split}.jsonl") for split in ("train", "validation", "test")}
        training = {"data": data, "max_new_tokens": 4} | changes.pop("training", {})
        backend = openrlhf_backend(max_length=48, extra_args=STRENGTH, **changes.pop("backend", {}))
        return arithmetic_run(backend, training, **changes)

    return make


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the trainers that a test starts; nothing of them is left when it ends."""
    found: list[str] = []
    real = TrainerProcess.__init__

    def start(self: TrainerProcess, *arguments: Any) -> None:
        real(self, *arguments)
        found.append(self.token)

    monkeypatch.setattr(TrainerProcess, "__init__", start)
    yield found
    assert found
    assert not any(leftovers(token) for token in found)


def between(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    return sum(float((after[key] - before[key]).square().sum()) for key in before) ** 0.5


def metrics(out: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


def check_jump(result: RunResult, out: Path) -> None:
    """The whole jump reached the trainer, which trained on from there, and the engines follow."""
    (jump,) = result.jumps
    assert jump["accepted"], jump["reason"]
    shift = load_file(out / "jumps" / "0001" / "shift.safetensors")
    length = sum(float(move.square().sum()) for move in shift.values()) ** 0.5
    step = between(stored(out, 3), stored(out, 2))
    assert length > step > 0
    landed = {
        key: value + shift[f"{key.removeprefix('base_model.model.').replace('.lora_', '.weight.lora_')[:-7]}"]
        for key, value in stored(out, 3).items()
    }
    # One step of training after the jump is far less than the jump, and without it the run would be at step 3.
    assert between(stored(out, 4), landed) < 0.7 * between(stored(out, 4), stored(out, 3))
    found = metrics(out)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert all(abs(record["vllm_kl"]) < 5e-3 for record in found.values()), found


def test_swap_continues_in_the_same_trainer(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(config(), out)
    check_jump(result, out)
    start, before, after = (result.accuracy[when] for when in ("start", "before_jump", "after_jump"))
    assert start is not None
    assert before is not None
    assert after is not None
    assert 0.15 < start < 0.3
    assert after != before
    assert (out / "trainer" / "final" / "adapter_model.safetensors").exists()
    # fp32 masters, not what bf16 leaves of them
    kept = stored(out, 6)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in kept.values())
    # OpenRLHF's own export of the end is the same policy, rounded.
    final = load_file(out / "trainer" / "final" / "adapter_model.safetensors")
    for key, value in kept.items():
        torch.testing.assert_close(final[key].float(), value, rtol=2**-7, atol=1e-6)


def test_restart_continues_in_a_new_trainer(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"algorithm": "rloo", "lr_scheduler": "linear"}
    result = run(config(backend={"jump": "restart"}, training=changes), out)
    check_jump(result, out)
    rates = [metrics(out)[step]["actor_lr"] for step in range(1, 7)]
    falls = [earlier - later for earlier, later in itertools.pairwise(rates)]
    assert falls == pytest.approx([1e-3 / 6] * 5, rel=1e-3), rates  # the schedule continues


def test_a_frozen_adapter_and_its_rollback_on_two_ranks(config: Config, tmp_path: Path) -> None:
    """ZeRO-3; a merged-space jump is a frozen adapter; a guard that nothing satisfies rolls it back."""
    out = tmp_path / "run"
    settings = config(
        backend={"estimator": "reinforce", "gpus": 2, "deepspeed": {"zero_stage": 3}},
        training={"algorithm": "reinforce++", "evaluation": "generate"},
        predictor={"name": "secant", "window": 2, "space": "merged"},
        schedule={"observe": 3, "every": 1, "horizon": 2, "alpha": 8, "settle": 2},
        guards={"max_drop": 1.0, "recovery": 2, "against": "trend", "tolerance": 0.0},
    )
    asked: list[tuple[str, Any]] = []

    def ask(real: Any, trainer: Trainer, what: str, **request: Any) -> Any:
        answer = real(trainer, what, **request)
        asked.append((what, request.get("adapters", answer)))
        return -1.0 if what == "greedy" and trainer.step == 5 else answer  # nothing is as bad

    with replaced("ask", ask):
        result = run(settings, out)
    (jump,) = result.jumps
    assert not jump["accepted"]
    assert "rolled back" in jump["reason"]
    assert result.accuracy["after_jump"] != result.accuracy["before_jump"]
    assert [len(adapters) for what, adapters in asked if what in ("load", "restore")] == [1, 0]
    assert result.steps == 6
    assert all(abs(record["vllm_kl"]) < 5e-3 for record in metrics(out).values())


def run_until_killed(settings: RunConfig, out: Path, step: int) -> None:
    """Run, and kill the trainer when it has paused after ``step``."""
    with killing(step), raises_kind("backend-process-lost", "SIGKILL", out / "trainer" / "trainer.log"):
        run(settings, out)


def test_a_killed_trainer_is_named_and_resumed_from_its_last_state(config: Config, tmp_path: Path) -> None:
    """A full-parameter run by swap: its trainer is killed after step 5, and a new one resumes from step 4."""
    out = tmp_path / "run"
    settings = config(training={"lora": None, "learning_rate": 1e-4})
    run_until_killed(settings, out, 5)
    before = stored(out, 4)
    result = run(settings, out)
    assert result.resumed_from == 4
    (jump,) = result.jumps
    assert jump["accepted"], jump["reason"]
    records = read_journal(out / "journal.jsonl")
    assert [record["event"] for record in records].count("jump") == 1
    after = stored(out, 4)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    landed = {key: stored(out, 3)[key] + move for key, move in load_file(out / "jumps/0001/shift.safetensors").items()}
    first, second = between(stored(out, 4), landed), between(stored(out, 5), stored(out, 4))
    assert 0 < second < 3 * first  # one step's length, from where it was, and not from the start
    assert sorted(metrics(out)) == [1, 2, 3, 4, 5, 6]


def test_a_restarted_trainer_resumes_with_all_models_on_one_gpu(config: Config, tmp_path: Path) -> None:
    """Restarted at the jump after step 3, killed after step 5, resumed from its own state of step 4."""
    out = tmp_path / "run"
    backend = {"jump": "restart", "colocate": "all", "deepspeed": {"adam_offload": True}}
    settings = config(backend=backend, training={"beta": 0.01})
    run_until_killed(settings, out, 5)
    before = stored(out, 4)
    result = run(settings, out)
    assert result.resumed_from == 4
    assert (out / "trainer" / "ckpt-000003" / "_actor" / "global_step6").exists()
    after = stored(out, 4)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    check_jump(result, out)


SCALING: dict[str, Any] = {"predictor": "auto", "schedule": {}, "guards": {}}


def test_auto_scales_the_steps_of_one_trainer(config: Config, tmp_path: Path, tokens: list[str]) -> None:
    out = tmp_path / "run"
    result = run(config(steps=12, training={"learning_rate": 1e-4}, save_every=10, **SCALING), out)
    assert len(tokens) == 1
    assert not (out / "checkpoints").exists()
    first, second = result.scaling
    assert (first["step"], first["multiple"], second["step"]) == (5, 1.0, 10)
    assert second["diagnostics"]["agreement"] > 0.1  # at such a small rate gradients agree
    assert second["multiple"] > 1
    assert second["rate"] == pytest.approx(1e-4 * second["multiple"])
    found = metrics(out)
    assert all(record["actor_lr"] == pytest.approx(1e-4) for record in found.values())  # the scheduler sees nothing
    assert all(abs(record["vllm_kl"]) < 5e-3 for record in found.values()), found
    assert result.average is not None
    assert sorted(result.average["tried"]) == ["20", "40", "80"]


def test_a_rate_that_is_far_too_large_is_undone_and_the_run_resumed(config: Config, tmp_path: Path) -> None:
    """Killed after step 12, it resumes from the state of step 10, in which the first steps are undone."""
    out = tmp_path / "run"
    training = {"learning_rate": 0.1, "prompts_per_step": 32}  # 256 rollouts: the fall is beyond chance by step 8
    settings = config(steps=15, training=training, save_every=10, **SCALING)
    run_until_killed(settings, out, 12)
    result = run(settings, out)
    assert result.resumed_from == 10
    undone = next(record for record in result.scaling if record.get("back_to") == 0)
    back = undone["step"]
    assert back <= 10
    assert undone["multiple"] <= 0.25
    assert result.scaling[-1]["step"] == 15
    found = metrics(out)
    assert sorted(found) == list(range(1, 16))
    # The first weights again, in the engines too: what the steps at this rate destroyed is back.
    assert found[back]["rollout/reward_mean"] < 0.1 < found[back + 1]["rollout/reward_mean"]
    assert all(abs(found[step]["vllm_kl"]) < 5e-3 for step in (back + 1, 11))
    assert result.accuracy["final"] is not None


def test_nothing_outlives_a_killed_run(config: Config, tmp_path: Path, tokens: list[str]) -> None:
    """SIGKILL to our own process while the trainer trains: Ray, DeepSpeed and vLLM are gone soon after."""
    out = tmp_path / "run"
    script = (
        "import json, sys; from pathlib import Path; from next_core.config import make_config; "
        "from next_core.cycle.run import run; run(make_config(json.loads(sys.argv[1])), Path(sys.argv[2]))"
    )
    settings = config().model_dump(mode="json")
    ours = subprocess.Popen([sys.executable, "-c", script, json.dumps(settings), str(out)])
    log = out / "trainer" / "trainer.log"
    end = time.monotonic() + 1200
    while not (log.exists() and "Global step 1" in log.read_text(errors="replace")):
        assert ours.poll() is None
        assert time.monotonic() < end
        time.sleep(0.5)
    (held,) = (p for p in psutil.Process(ours.pid).children() if "supervisor.py" in " ".join(p.cmdline()))
    tokens.append(held.environ()[TOKEN])
    assert len(leftovers(tokens[0])) > 8  # Ray, the actors, the engine
    os.kill(ours.pid, signal.SIGKILL)
    ours.wait()
    end = time.monotonic() + 300
    while leftovers(tokens[0]):
        assert time.monotonic() < end
        time.sleep(0.5)
