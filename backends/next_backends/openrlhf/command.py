"""From a run config to OpenRLHF's command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_backends.openrlhf.known_options import check_extra
from next_core.errors import ConfigError
from next_core.sources.tensor_files import read_json

if TYPE_CHECKING:
    from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
    from next_core.run_config import LoraSettings, RunConfig, TrainingSettings

ESTIMATORS = {"grpo": ("group_norm", "dr_grpo"), "rloo": ("rloo",), "reinforce++": ("reinforce_baseline", "reinforce")}
"""Advantage estimators of each algorithm, the default first."""


@dataclass(frozen=True)
class Places:
    """What a trainer reads and where it writes; ``reward_url`` is a Python file or an http address."""

    model: Path
    data: Path
    reward_url: str
    checkpoints: Path
    output: Path


@dataclass(frozen=True)
class Segment:
    """What one trainer process is to do; ``samples`` is the number of prompts of an episode (None: all)."""

    episodes: int
    samples: int | None
    seed: int
    save_every: int | None
    save_hf: bool
    save_deepspeed: bool
    load: bool
    keep: int = 3
    """States that are kept."""
    chat: bool = False
    """Whether prompts are conversations."""


def make_command(run: RunConfig, config: OpenRlhfConfig, places: Places, segment: Segment) -> list[str]:
    """OpenRLHF's options, without the program. Raises ``ConfigError`` for what OpenRLHF or this backend cannot do."""
    extra = check_extra(config)
    training = run.training
    for path, separators in ((str(places.data), ",@"), (places.reward_url, ",")):
        if set(path) & set(separators):
            raise ConfigError(f"{path}: OpenRLHF takes {' and '.join(separators)} in it for a separator; rename it")
    if segment.samples is not None and segment.samples % training.prompts_per_step:
        raise ConfigError(
            f"{segment.samples} prompts are no whole number of steps of {training.prompts_per_step}; OpenRLHF would "
            "train the last of them on a part of the prompts, and leave its update for the next"
        )
    micro_batch = _micro_batch(training, config, extra.get("--ds.ring_attn_size", 1))
    vllm, deepspeed = config.vllm, config.deepspeed
    options: dict[str, Any] = {
        "--actor.model_name_or_path": places.model,
        "--actor.num_nodes": config.nodes,
        "--actor.num_gpus_per_node": config.gpus,
        "--ref.num_nodes": config.nodes,
        "--ref.num_gpus_per_node": config.gpus,
        "--train.colocate_actor_ref": config.colocate != "none",
        "--train.colocate_all": config.colocate == "all",
        "--vllm.num_engines": vllm.engines,
        "--vllm.tensor_parallel_size": vllm.tensor_parallel,
        "--vllm.gpu_memory_utilization": vllm.gpu_memory,
        "--vllm.sync_backend": vllm.sync,
        "--vllm.enforce_eager": vllm.eager,
        "--vllm.enable_prefix_caching": vllm.prefix_caching,
        "--vllm.enable_sleep": vllm.sleep,
        "--ds.enable_sleep": vllm.sleep,
        "--ds.zero_stage": deepspeed.zero_stage,
        "--ds.param_dtype": deepspeed.dtype,
        "--ds.attn_implementation": deepspeed.attention,
        "--ds.adam_offload": deepspeed.adam_offload,
        "--actor.gradient_checkpointing_enable": deepspeed.gradient_checkpointing,
        "--actor.adam.lr": training.learning_rate,
        "--actor.lr_scheduler": training.lr_scheduler,
        "--actor.lr_warmup_ratio": 0,
        "--rollout.batch_size": training.prompts_per_step,
        "--rollout.n_samples_per_prompt": training.generations,
        "--rollout.micro_batch_size": micro_batch,
        "--rollout.temperature": training.temperature,
        "--rollout.max_new_tokens": training.max_new_tokens,
        "--train.batch_size": training.prompts_per_step * training.generations,
        "--train.micro_batch_size": micro_batch,
        "--train.num_episodes": segment.episodes,
        "--train.seed": segment.seed,
        "--data.prompt_dataset": places.data,
        "--data.input_key": "prompt",
        "--data.label_key": "answer",
        "--data.max_len": _max_length(training, config),
        "--data.max_samples": segment.samples,
        "--reward.remote_url": places.reward_url,
        "--algo.advantage.estimator": _estimator(training, config),
        "--ckpt.path": places.checkpoints,
        "--ckpt.output_dir": places.output,
        "--ckpt.save_steps": -1 if segment.save_every is None else segment.save_every,
        "--ckpt.save_hf": segment.save_hf,
        "--ckpt.max_num": segment.keep,
        "--data.apply_chat_template": segment.chat,
        "--ckpt.best_metric_key": "none",  # the newest state is the one to go on from, not the best
        "--ckpt.disable_ds": not segment.save_deepspeed,
        "--ckpt.load_enable": segment.load,
        **_kl(training),
        **(_lora(training.lora) if training.lora else {}),
    }
    return [*_words(options), *config.extra_args]


def gpus_needed(run: RunConfig, config: OpenRlhfConfig) -> int:
    """GPUs of actor, reference and engines together, as OpenRLHF asks Ray for them."""
    actor, engines = config.nodes * config.gpus, config.vllm.engines * config.vllm.tensor_parallel
    if config.colocate == "all":
        return actor
    reference = actor if run.training.beta > 0 and config.colocate == "none" else 0
    return actor + reference + engines


def _estimator(training: TrainingSettings, config: OpenRlhfConfig) -> str:
    allowed = ESTIMATORS[training.algorithm]
    if config.estimator is not None and config.estimator not in allowed:
        raise ConfigError(
            f"backend.estimator: {config.estimator} is no estimator of training.algorithm: {training.algorithm}, which "
            f"takes {' or '.join(allowed)}"
        )
    return config.estimator or allowed[0]


def _kl(training: TrainingSettings) -> dict[str, Any]:
    """GRPO has the divergence in its loss (arXiv 2402.03300, eq. 3), the others in the reward."""
    if training.beta == 0 or training.algorithm != "grpo":
        return {"--algo.kl.init_coef": training.beta, "--algo.kl.estimator": "k1"}
    return {"--algo.kl.init_coef": training.beta, "--algo.kl.use_loss": True, "--algo.kl.estimator": "k3"}


def _lora(lora: LoraSettings) -> dict[str, Any]:
    if lora.rslora:
        raise ConfigError("training.lora.rslora: OpenRLHF has no rsLoRA; set alpha to alpha * sqrt(rank)")
    if lora.alpha != int(lora.alpha):
        raise ConfigError(f"training.lora.alpha: OpenRLHF takes whole numbers (got {lora.alpha:g})")
    targets: str | list[str] | None = lora.target_modules
    if targets == "all-linear":
        targets = None  # OpenRLHF's default; given as an option it becomes a list, which PEFT takes for a module's name
    elif isinstance(targets, str) and not re.fullmatch(r"\w+", targets):
        raise ConfigError(
            f"training.lora.target_modules: OpenRLHF takes names of modules, no regular expression ('{targets}'); "
            "list the names, or leave it at all-linear"
        )
    elif targets == []:
        raise ConfigError("training.lora.target_modules: the list is empty; name modules, or leave it at all-linear")
    return {
        "--ds.lora.rank": lora.rank,
        "--ds.lora.alpha": int(lora.alpha),
        "--ds.lora.target_modules": [targets] if isinstance(targets, str) else targets,
    }


def _micro_batch(training: TrainingSettings, config: OpenRlhfConfig, ring: int) -> int:
    """The largest micro-batch allowed that divides the roll-outs that a data-parallel rank has in a step."""
    rollouts = training.prompts_per_step * training.generations
    gpus = config.nodes * config.gpus
    if ring < 1 or gpus % ring:
        raise ConfigError(
            f"backend.extra_args: --ds.ring_attn_size {ring} does not divide the {gpus} GPUs of the actor"
        )
    share, left = divmod(rollouts, gpus // ring)
    if left or not share:
        raise ConfigError(
            f"the {rollouts} roll-outs of a step (training.prompts_per_step * training.generations) cannot be shared "
            f"among {gpus // ring} data-parallel ranks (backend.nodes * backend.gpus); make them a multiple"
        )
    return next(size for size in range(min(config.micro_batch, share), 0, -1) if share % size == 0)


def _max_length(training: TrainingSettings, config: OpenRlhfConfig) -> int:
    longest: int = training.max_new_tokens + 1024
    positions = read_json(training.model / "config.json").get("max_position_embeddings")
    if isinstance(positions, int):
        longest = min(longest, positions)
    longest = config.max_length or longest
    if longest <= training.max_new_tokens:
        raise ConfigError(
            f"backend.max_length: {longest} tokens leave no room for a prompt beside training.max_new_tokens "
            f"({training.max_new_tokens})"
        )
    return longest


def _words(options: Mapping[str, Any]) -> list[str]:
    """None and False leave an option out, True is a flag, a list is several values."""
    words = []
    for option, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [option, *map(str, values)]
    return words
