"""What a run config becomes for verl, and what is refused. `make test-verl` has verl's own Hydra read the overrides."""

from pathlib import Path
from typing import Any

import pytest

from next_backends.verl.command import check_run, make_overrides
from next_backends.verl.verl_config import VerlConfig
from next_core.run_config import RunConfig
from tests.errors import raises_kind

ACTOR = "actor_rollout_ref.actor"


def run_of(**training: Any) -> RunConfig:
    data = {"train": "train.jsonl"}
    model = {"model": "some/model", "data": data, "prompts_per_step": 8, "generations": 4}
    return RunConfig.model_validate({"steps": 5, "seed": 7, "training": model | training})


def config(**block: Any) -> VerlConfig:
    return VerlConfig.model_validate({"python": "/env/bin/python", **block})


def overrides(training: dict[str, Any] | None = None, **block: Any) -> dict[str, str]:
    words = make_overrides(run_of(**(training or {})), config(**block), {})
    return dict(word.partition("=")[::2] for word in words)


def test_the_run_configs_settings_are_verls() -> None:
    found = overrides(
        {"learning_rate": 1e-4, "temperature": 0.9, "max_new_tokens": 32, "lr_scheduler": "cosine"},
        max_prompt=99,
        fsdp={"dtype": "float32"},
    )
    expected = {
        "data.train_batch_size": "8",
        f"{ACTOR}.ppo_mini_batch_size": "8",  # one optimizer step in an RL step
        f"{ACTOR}.ppo_epochs": "1",
        f"{ACTOR}.optim.lr": "0.0001",
        f"{ACTOR}.optim.lr_scheduler_type": '"cosine"',
        f"{ACTOR}.strategy": '"fsdp2"',
        f"{ACTOR}.fsdp_config.model_dtype": '"fp32"',
        "actor_rollout_ref.rollout.n": "4",
        "actor_rollout_ref.rollout.temperature": "0.9",
        "data.max_prompt_length": "99",
        "data.max_response_length": "32",
        "data.seed": "7",
        "trainer.total_training_steps": "5",
        "trainer.logger": '["console"]',
        "actor_rollout_ref.model.lora_rank": "8",
        "actor_rollout_ref.model.lora_alpha": "16",
        "actor_rollout_ref.model.target_modules": '"all-linear"',
    }
    assert expected.items() <= found.items()
    precision = found[f"+{ACTOR}.fsdp_config.mixed_precision"]
    assert precision == '{param_dtype:"float32",reduce_dtype:"float32",buffer_dtype:"float32"}'


@pytest.mark.parametrize(
    ("training", "block", "expected"),
    [
        ({}, {}, ("grpo", "true", "false", "false")),
        ({"beta": 0.1}, {}, ("grpo", "true", "true", "false")),
        ({}, {"estimator": "dr_grpo"}, ("grpo", "false", "false", "false")),
        ({"algorithm": "rloo", "beta": 0.1}, {}, ("rloo", "true", "false", "true")),
        ({"algorithm": "reinforce++"}, {}, ("reinforce_plus_plus_baseline", "true", "false", "false")),
        (
            {"algorithm": "reinforce++"},
            {"estimator": "reinforce_plus_plus"},
            ("reinforce_plus_plus", "true", "false", "false"),
        ),
    ],
)
def test_algorithms_have_estimators(training: dict[str, Any], block: dict[str, Any], expected: tuple[str, ...]) -> None:
    found = overrides(training, **block)
    names = ("adv_estimator", "norm_adv_by_std_in_grpo", "use_kl_in_reward")
    estimator, norm, in_reward = (found[f"algorithm.{name}"] for name in names)
    assert (estimator.strip('"'), norm, found[f"{ACTOR}.use_kl_loss"], in_reward) == expected


def test_full_parameters_have_no_adapter() -> None:
    found = overrides({"lora": None})
    assert found["actor_rollout_ref.model.lora_rank"] == "0"
    assert "actor_rollout_ref.rollout.load_format" not in found


@pytest.mark.parametrize(("micro_batch", "gpus", "expected"), [(8, 1, 8), (5, 1, 4), (64, 1, 32), (64, 2, 16)])
def test_micro_batches_divide_the_rollouts_of_a_gpu(micro_batch: int, gpus: int, expected: int) -> None:
    found = overrides(micro_batch=micro_batch, gpus=gpus)
    assert found[f"{ACTOR}.ppo_micro_batch_size_per_gpu"] == str(expected)


def test_values_are_quoted_for_hydra_and_own_overrides_come_last() -> None:
    words = make_overrides(
        run_of(lora={"target_modules": ["q_proj", "v_proj"]}),
        config(overrides=[f"{ACTOR}.clip_ratio=0.3"]),
        {"data.train_files": ("`next-core run`", Path('/a "b"\\c')), "trainer.resume_from_path": ("", None)},
    )
    assert 'data.train_files="/a \\"b\\"\\\\c"' in words
    assert "trainer.resume_from_path=null" in words
    assert 'actor_rollout_ref.model.target_modules=["q_proj","v_proj"]' in words
    assert words[-1] == f"{ACTOR}.clip_ratio=0.3"


@pytest.mark.parametrize(
    ("word", "kind", "named"),
    [
        ("--config-name=other", "config-invalid-value", "KEY=VALUE"),
        ("trainer.project_name", "config-invalid-value", "KEY=VALUE"),
        (f"{ACTOR}.optim.lr=1", "config-contradiction", "training.learning_rate"),
        (f"++{ACTOR}.optim.lr=1", "config-contradiction", "training.learning_rate"),
        (f"{ACTOR}.optim={{lr:1}}", "config-contradiction", "training.learning_rate"),
        ("trainer.nnodes=2", "config-contradiction", "this backend"),
        ("trainer.v1.trainer_mode=separate_async", "backend-unsupported", "in flight"),
        ("critic.optim.lr=1", "backend-unsupported", "critic"),
        ("model_engine=megatron", "backend-unsupported", "FSDP2"),
        ("actor@actor_rollout_ref.actor=megatron_actor", "backend-unsupported", "FSDP2"),
        ("reward.reward_model.enable=true", "backend-unsupported", "training.reward"),
        ("actor_rollout_ref.model.lora.rank=8", "backend-unsupported", "training.lora"),
        ("actor_rollout_ref.actor.fsdp_config.fsdp_size=1", "backend-unsupported", "FSDP2"),
    ],
)
def test_overrides_cannot_set_what_is_set_or_unsupported(word: str, kind: str, named: str) -> None:
    with raises_kind(kind, named):
        check_run(run_of(), config(overrides=[word]))


@pytest.mark.parametrize(
    ("training", "block", "kind", "named"),
    [
        ({"lr_scheduler": "linear"}, {}, "backend-unsupported", "constant and cosine"),
        ({"lora": {"rslora": True}}, {}, "backend-unsupported", "rsLoRA"),
        ({"lora": {"alpha": 1.5}}, {}, "backend-unsupported", "1.5"),
        ({}, {"estimator": "rloo"}, "config-contradiction", "training.algorithm"),
        ({}, {"gpus": 3}, "config-contradiction", "prompts_per_step"),
    ],
)
def test_what_verl_cannot_do_is_refused(training: dict[str, Any], block: dict[str, Any], kind: str, named: str) -> None:
    with raises_kind(kind, named):
        check_run(run_of(**training), config(**block))
