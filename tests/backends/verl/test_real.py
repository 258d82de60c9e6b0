"""The whole verl on a CPU: Ray, TransferQueue, vLLM's engine, FSDP2, driven through the cycle. Minutes a run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from next_core.cycle.run import run
from next_core.run_config import RunConfig
from next_core.sources.metrics import METRICS, by_step, read_log
from tests.backends.external.real import TASK, arithmetic_run, killing
from tests.errors import raises_kind

pytestmark = pytest.mark.verl
OVERRIDES = (
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.rollout.free_cache_engine=false",  # vLLM's engine has no sleep mode on a CPU
    "+actor_rollout_ref.rollout.enable_sleep_mode=false",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.rollout.max_num_seqs=64",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "actor_rollout_ref.rollout.calculate_log_probs=true",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_memory_monitor_refresh_ms": "0",
}


@pytest.fixture(scope="module")
def config(
    verl_backend: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """A run of five steps with a jump after the third; keywords replace blocks or go into ``training``."""
    base = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(TASK / "base", base)
    tokenizer = base / "tokenizer.json"  # verl asks the tokenizer of a Qwen model for a line feed
    tokenizer.write_text(tokenizer.read_text().replace('"/": 18', '"\\u010a": 18'))

    def make(**changes: Any) -> RunConfig:
        training = {"model": str(base), "prompts_per_step": 8, "generations": 4, "max_new_tokens": 6}
        training |= changes.pop("training", {})
        ray = {"num_gpus": 2, "num_cpus": 64, "object_store_mib": 200}
        vllm = {"gpu_memory": 0.05, "eager": True}
        backend = verl_backend(ray=ray, vllm=vllm, env=ENVIRONMENT, overrides=OVERRIDES)
        return arithmetic_run(backend, training, **{"steps": 5} | changes)

    return make


def metrics(out: Path) -> dict[int, dict[str, Any]]:
    return {int(step): found for step, found in by_step(read_log(out / METRICS)).items()}


def test_a_factor_jump_reaches_the_actor_and_the_engine(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(config(), out)
    (jump,) = result.jumps
    assert jump["accepted"], jump["reason"]
    assert result.steps == 5
    found = metrics(out)
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert (out / "trainer" / "checkpoints" / "global_step_4" / "actor").is_dir()
    shift = load_file(out / "jumps" / "0001" / "shift.safetensors")
    assert max(float(move.abs().max()) for move in shift.values()) > 1e-3
    # The engine samples from the weights that train: the step after the jump included.
    for step, record in found.items():
        assert record["training/rollout_probs_diff_mean"] < 1e-5, (step, record)


def test_auto_in_a_full_parameter_run_killed_and_resumed(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Killed after step 6, it resumes from verl's checkpoint of step 5. Accuracy is verl's own validation."""
    out = tmp_path / "run"
    rows = (TASK / "validation.jsonl").read_text().splitlines(keepends=True)[:32]
    (tmp_path / "validation.jsonl").write_text("".join(rows))
    data = {"train": str(TASK / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    training = {"lora": None, "learning_rate": 1e-4, "evaluation": "generate", "data": data}
    scaling = {"predictor": "auto", "schedule": {}, "guards": {}}
    settings = config(steps=7, save_every=5, training=training, **scaling)
    with killing(6), raises_kind("backend-process-lost", out / "trainer" / "trainer.log"):
        run(settings, out)
    result = run(settings, out)
    assert result.resumed_from == 5
    assert [(record["step"], record["multiple"]) for record in result.scaling] == [(5, 1.0)]
    assert (out / "trainer" / "checkpoints" / "global_step_5" / "actor" / "next-core").is_dir()
    assert not (out / "checkpoints").exists()
    for when in ("start", "final"):
        share = result.accuracy[when]
        assert share is not None
        assert 0.5 < share < 0.9
        assert share * 32 == pytest.approx(round(share * 32))  # so many of 32 prompts
    assert result.average is not None
    assert result.average["tried"]["20"] is not None  # the mean of the weights reached the engine and was undone
    found = metrics(out)
    assert sorted(found) == list(range(1, 8))
    assert all(record["training/rollout_probs_diff_mean"] < 1e-5 for record in found.values())
