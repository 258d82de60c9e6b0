"""From a run config to verl's Hydra overrides. What verl or this backend cannot do is refused here."""

from typing import Any

from next_backends.external.external_config import chosen_estimator, largest_divisor, unsupported_setting
from next_backends.verl.verl_config import VerlConfig
from next_core.errors import contradiction, invalid_value
from next_core.run_config import RunConfig, TrainingSettings

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
Overrides = dict[str, tuple[str, Any]]  # By key of verl's config: what sets it, as an error names it, and the value
REFUSED = {
    "algorithm.filter_groups": "a step would take another number of prompts",
    "critic": "no estimator of this backend has a critic",
    "custom_reward_function": "set training.reward",
    "data.trust_remote_code": "code of a model is not run",
    "distillation": "the backend trains by rewards alone",
    f"{ACTOR}.fsdp_config.fsdp_size": "the backend reads and writes weights that FSDP2 shards over all GPUs",
    f"{ACTOR}.fsdp_config.offload_policy": "set backend.fsdp.offload",
    f"{ACTOR}.megatron": "the backend reads and writes weights that FSDP2 shards",
    f"{ACTOR}.ulysses_sequence_parallel_size": "the backend does not compute accuracies over parts of sequences",
    f"{MODEL}.lora": "set training.lora",
    f"{MODEL}.lora_adapter_path": "RL starts at training.model; merge the adapter first",
    f"{MODEL}.trust_remote_code": "code of a model is not run",
    "model_engine": "the backend reads and writes weights that FSDP2 shards",
    "ray_kwargs": "set backend.ray",
    "reward.reward_manager": "set training.reward",
    "reward.reward_model": "set training.reward",
    "reward.sandbox_fusion": "set training.reward",
    "trainer.nnodes": "verl's Ray runs on this machine",
    "trainer.use_v1": "the backend drives the v1 trainer",
    "trainer.v1": "weights would change while rollouts of the old ones are in flight",
}
"""Keys that the backend cannot work with, or how they begin, and why."""
ESTIMATORS = {
    "grpo": ("grpo", "dr_grpo"),
    "rloo": ("rloo",),
    "reinforce++": ("reinforce_plus_plus_baseline", "reinforce_plus_plus"),
}
"""Advantage estimators of each algorithm, the default first."""
TEXT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template for prompts that are plain text: verl knows conversations only."""


def make_overrides(run: RunConfig, config: VerlConfig, trainer: Overrides) -> list[str]:
    """Return verl's overrides; ``trainer`` holds those of one trainer process.

    Raises ``ConfigError`` for what verl or this backend cannot do.
    """
    training, batch = run.training, run.training.prompts_per_step
    micro_batch = "backend.micro_batch", _micro_batch(training, config)
    found: Overrides = {
        "data.train_batch_size": ("training.prompts_per_step", batch),
        "data.max_prompt_length": ("backend.max_prompt", config.max_prompt),
        "data.max_response_length": ("training.max_new_tokens", training.max_new_tokens),
        "data.filter_overlong_prompts": ("backend.max_prompt", True),
        "data.seed": ("seed", run.seed),
        f"{MODEL}.path": ("training.model", training.model),
        f"{MODEL}.enable_gradient_checkpointing": (
            "backend.fsdp.gradient_checkpointing",
            config.fsdp.gradient_checkpointing,
        ),
        f"{MODEL}.use_remove_padding": ("backend.fsdp.remove_padding", config.fsdp.remove_padding),
        f"+{MODEL}.override_config.attn_implementation": ("backend.fsdp.attention", config.fsdp.attention),
        f"{ACTOR}.strategy": ("this backend", "fsdp2"),
        f"{ACTOR}.fsdp_config.strategy": ("this backend", "fsdp2"),
        f"{ACTOR}.fsdp_config.model_dtype": ("this backend", "fp32"),
        f"{ACTOR}.fsdp_config.dtype": ("backend.fsdp.dtype", config.fsdp.dtype),
        f"+{ACTOR}.fsdp_config.mixed_precision": (
            "backend.fsdp.dtype",
            {"param_dtype": config.fsdp.dtype, "reduce_dtype": "float32", "buffer_dtype": "float32"},
        ),
        f"{ACTOR}.fsdp_config.param_offload": ("backend.fsdp.offload", config.fsdp.offload),
        f"{ACTOR}.fsdp_config.optimizer_offload": ("backend.fsdp.offload", config.fsdp.offload),
        f"{ACTOR}.fsdp_config.seed": ("seed", run.seed),
        f"{ACTOR}.ppo_mini_batch_size": ("training.prompts_per_step", batch),
        f"{ACTOR}.ppo_epochs": ("this backend", 1),
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro_batch,
        f"{ACTOR}.data_loader_seed": ("seed", run.seed),
        f"{ACTOR}.optim.lr": ("training.learning_rate", training.learning_rate),
        f"{ACTOR}.optim.lr_scheduler_type": ("training.lr_scheduler", _scheduler(training)),
        f"{ROLLOUT}.name": ("this backend", "vllm"),
        f"{ROLLOUT}.n": ("training.generations", training.generations),
        f"{ROLLOUT}.temperature": ("training.temperature", training.temperature),
        f"{ROLLOUT}.seed": ("seed", run.seed),
        f"{ROLLOUT}.tensor_model_parallel_size": ("backend.vllm.tensor_parallel", config.vllm.tensor_parallel),
        f"{ROLLOUT}.gpu_memory_utilization": ("backend.vllm.gpu_memory", config.vllm.gpu_memory),
        f"{ROLLOUT}.enforce_eager": ("backend.vllm.eager", config.vllm.eager),
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": micro_batch,
        "trainer.n_gpus_per_node": ("backend.gpus", config.gpus),
        "trainer.nnodes": ("this backend", 1),
        "trainer.total_training_steps": ("steps", run.steps),
        "trainer.total_epochs": ("steps", run.steps),  # more than enough: the run ends when its steps are done
        "trainer.logger": ("this backend", ["console"]),
        "trainer.val_before_train": ("this backend", False),
        "trainer.test_freq": ("this backend", -1),
        **_algorithm(training, config),
        **_lora(training),
        **trainer,
    }
    for word in config.overrides:
        _check_override(word, found)
    return [*(f"{key}={_written(value)}" for key, (_, value) in found.items()), *config.overrides]


def check_run(run: RunConfig, config: VerlConfig) -> None:
    """Raise ``ConfigError`` for a run that this backend does not support."""
    make_overrides(run, config, {})


def _written(value: Any) -> str:
    """Return a value as Hydra's grammar reads it back."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _check_override(word: str, ours: Overrides) -> None:
    """Raise ``ConfigError`` for an override of what we set ourselves or cannot work with."""
    key, equals, _ = word.lstrip("+~").partition("=")
    if not equals or not key[:1].isalpha():
        raise invalid_value(f"backend.overrides: '{word}' is not KEY=VALUE, as Hydra expects")
    for name, (owner, _) in ours.items():
        if _within(name.lstrip("+"), key) or _within(key, name.lstrip("+")):
            raise contradiction(f"backend.overrides: {name} is set by {owner}")
    for name, reason in REFUSED.items():
        if _within(key, name) or _within(name, key):
            raise unsupported_setting(f"backend.overrides: {key} is not supported: {reason}")
    if "@" in key or "/" in key:
        raise unsupported_setting(
            f"backend.overrides: {key} replaces a part of verl's config, which is made for FSDP2 and vLLM"
        )


def _within(key: str, block: str) -> bool:
    return key == block or key.startswith(f"{block}.")


def _scheduler(training: TrainingSettings) -> str:
    if training.lr_scheduler not in ("constant", "cosine"):
        raise unsupported_setting(f"training.lr_scheduler: {training.lr_scheduler}: verl has constant and cosine only")
    return training.lr_scheduler


def _algorithm(training: TrainingSettings, config: VerlConfig) -> Overrides:
    chosen, key = chosen_estimator(training, config, ESTIMATORS), "backend.estimator"
    in_loss = training.algorithm == "grpo" and training.beta > 0  # arXiv 2402.03300, eq. 3; else in the reward
    in_reward = training.beta > 0 and not in_loss
    return {
        "algorithm.adv_estimator": (key, chosen.removeprefix("dr_")),
        "algorithm.norm_adv_by_std_in_grpo": (key, chosen != "dr_grpo"),
        f"{ACTOR}.loss_agg_mode": (key, "seq-mean-token-sum-norm" if chosen == "dr_grpo" else "token-mean"),
        f"{ACTOR}.use_kl_loss": ("training.beta", in_loss),
        f"{ACTOR}.kl_loss_coef": ("training.beta", training.beta),
        "algorithm.use_kl_in_reward": ("training.beta", in_reward),
        "algorithm.kl_ctrl.kl_coef": ("training.beta", training.beta),
    }


def _lora(training: TrainingSettings) -> Overrides:
    lora, key = training.lora, "training.lora"
    if lora is None:
        return {f"{MODEL}.lora_rank": (key, 0)}
    if lora.rslora or lora.alpha != int(lora.alpha):
        what = "rslora: verl has no rsLoRA" if lora.rslora else f"alpha: verl takes whole numbers, not {lora.alpha:g}"
        raise unsupported_setting(f"{key}.{what}")
    return {
        f"{MODEL}.lora_rank": (f"{key}.rank", lora.rank),
        f"{MODEL}.lora_alpha": (f"{key}.alpha", int(lora.alpha)),
        f"{MODEL}.target_modules": (f"{key}.target_modules", lora.target_modules),
        f"{ROLLOUT}.load_format": (key, "safetensors"),  # adapters are sent alone: the engines read the base model
    }


def _micro_batch(training: TrainingSettings, config: VerlConfig) -> int:
    """Return the largest allowed micro-batch that divides the rollouts of a GPU in a step."""
    if training.prompts_per_step % config.gpus:
        raise contradiction(
            f"training.prompts_per_step ({training.prompts_per_step}) must be a multiple of backend.gpus "
            f"({config.gpus}), which share a step's rollouts"
        )
    return largest_divisor(training.prompts_per_step * training.generations // config.gpus, config.micro_batch)
