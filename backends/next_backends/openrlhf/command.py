"""From a run config to OpenRLHF's command line. What OpenRLHF or this backend cannot do is refused here."""

import argparse
import re
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from next_backends.external.external_config import chosen_estimator, largest_divisor, unsupported_setting
from next_backends.external.trainer_setup import scales_steps
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_core.errors import contradiction, invalid_value
from next_core.run_config import RunConfig, TrainingSettings
from next_core.sources.tensor_files import read_json

Options = dict[str, tuple[str, Any]]
"""By option: what sets it, as an error names it, and the value. None and False leave it out, True is a flag."""

FIELDS = {
    "--actor.adam.lr": "training.learning_rate",
    "--actor.gradient_checkpointing_enable": "backend.deepspeed.gradient_checkpointing",
    "--actor.lr_scheduler": "training.lr_scheduler",
    "--actor.num_gpus_per_node": "backend.gpus",
    "--algo.kl.init_coef": "training.beta",
    "--ds.adam_offload": "backend.deepspeed.adam_offload",
    "--ds.attn_implementation": "backend.deepspeed.attention",
    "--ds.enable_sleep": "backend.vllm.sleep",
    "--ds.param_dtype": "backend.deepspeed.dtype",
    "--ds.zero_stage": "backend.deepspeed.zero_stage",
    "--ref.num_gpus_per_node": "backend.gpus",
    "--rollout.batch_size": "training.prompts_per_step",
    "--rollout.max_new_tokens": "training.max_new_tokens",
    "--rollout.n_samples_per_prompt": "training.generations",
    "--rollout.temperature": "training.temperature",
    "--vllm.enable_prefix_caching": "backend.vllm.prefix_caching",
    "--vllm.enable_sleep": "backend.vllm.sleep",
    "--vllm.enforce_eager": "backend.vllm.eager",
    "--vllm.gpu_memory_utilization": "backend.vllm.gpu_memory",
    "--vllm.num_engines": "backend.vllm.engines",
    "--vllm.sync_backend": "backend.vllm.sync",
    "--vllm.tensor_parallel_size": "backend.vllm.tensor_parallel",
}
"""Options that have the value of a field of the run config."""
REFUSED = {
    "--actor.freeze_visual_encoder": "the backend does not train on images",
    "--actor.num_nodes": "the trainer's Ray runs on this machine",
    "--actor.optim": "jumps know Adam's state only",
    "--critic.": "no estimator of this backend has a critic",
    "--data.input_template": "accuracy is measured without it; write the template into the data",
    "--data.max_images_per_prompt": "the backend does not train on images",
    "--ds.load_in_4bit": "the engines need base weights and adapter merged, which 4 bits cannot hold",
    "--ds.tensor_parallel_size": "jumps cannot write weights where DeepSpeed splits each matrix; use ZeRO",
    "--ds.use_universal_ckpt": "universal checkpoints cannot be read back",
    "--local_rank": "Ray assigns the ranks",
    "--ref.num_nodes": "the trainer's Ray runs on this machine",
    "--reward.model_name_or_path": "rewards are verifiable: set training.reward or backend.reward_file",
    "--rollout.vllm_generate_batch_size": "a step generates exactly training.prompts_per_step prompts",
    "--train.agent_func_path": "an agent would replace training.reward",
    "--train.async_enable": "weights would change while rollouts of the old ones are in flight",
    "--train.enable_ema": "it saves an average instead of the weights that a jump changes",
    "--train.partial_rollout_enable": "weights would change while rollouts of the old ones are in flight",
}
"""Options that the backend cannot work with, or how their names begin, and why."""
ESTIMATORS = {"grpo": ("group_norm", "dr_grpo"), "rloo": ("rloo",), "reinforce++": ("reinforce_baseline", "reinforce")}
"""Advantage estimators of each algorithm, the default first."""
MOST_RESTARTS = 20  # With more, starting trainers would take longer than jumping saves


def make_command(run: RunConfig, config: OpenRlhfConfig, trainer: Options) -> list[str]:
    """Return OpenRLHF's options, without the program; ``trainer`` holds those of one trainer process.

    Raises ``ConfigError`` for what OpenRLHF or this backend cannot do.
    """
    for option, separators in (("--data.prompt_dataset", ",@"), ("--reward.remote_url", ",")):
        path = str(trainer[option][1])
        if set(path) & set(separators):
            raise invalid_value(f"{path}: OpenRLHF reads {' and '.join(separators)} in it as a separator; rename it")
    training, blocks = run.training, SimpleNamespace(training=run.training, backend=config)
    micro_batch = "backend.micro_batch", _micro_batch(training, config)
    in_loss = training.algorithm == "grpo" and training.beta > 0  # arXiv 2402.03300, eq. 3; else in the reward
    options: Options = {
        **{option: (field, attrgetter(field)(blocks)) for option, field in FIELDS.items()},
        "--algo.advantage.estimator": ("backend.estimator", chosen_estimator(training, config, ESTIMATORS)),
        "--algo.kl.estimator": ("training.algorithm", "k3" if in_loss else "k1"),
        "--algo.kl.use_loss": ("training.algorithm", in_loss),
        "--ckpt.best_metric_key": ("save_every", "none"),  # a resumed run needs the newest state, not the best
        "--data.input_key": ("training.data", "prompt"),
        "--data.label_key": ("training.data", "answer"),
        "--data.max_len": ("backend.max_length", _max_length(training, config)),
        "--rollout.micro_batch_size": micro_batch,
        "--train.batch_size": ("training.prompts_per_step", training.prompts_per_step * training.generations),
        "--train.colocate_actor_ref": ("backend.colocate", config.colocate != "none"),
        "--train.colocate_all": ("backend.colocate", config.colocate == "all"),
        "--train.micro_batch_size": micro_batch,
        **_lora(training),
        **trainer,
    }
    _check_extra(config, options)
    words = ["--actor.lr_warmup_ratio", "0"]  # extra_args may replace it
    for option, (_, value) in options.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [option, *map(str, values)]
    return [*words, *config.extra_args]


def gpus_needed(run: RunConfig, config: OpenRlhfConfig) -> int:
    """Return the GPUs of actor, reference and engines together, as OpenRLHF asks Ray for them."""
    if config.colocate == "all":
        return config.gpus
    reference = config.gpus if run.training.beta > 0 and config.colocate == "none" else 0
    return config.gpus + reference + config.vllm.engines * config.vllm.tensor_parallel


def check_run(run: RunConfig, config: OpenRlhfConfig) -> None:
    """Raise ``ConfigError`` for a run that this backend does not support."""
    if config.jump == "restart" and scales_steps(run):
        raise unsupported_setting(
            f"backend.jump: restart begins a trainer at each jump, and predictor '{run.predictor.name}' makes none: it "
            "scales the steps of one trainer; use swap, or a predictor that jumps, such as adaptive-secant"
        )
    jumps = len(run.schedule.attempt_steps(run.steps)[: run.schedule.jumps])
    if run.training.evaluation == "likelihood" and _ring(config) > 1:
        raise unsupported_setting("training.evaluation: likelihood is not computed on rings; use generate")
    if config.jump == "restart" and jumps > MOST_RESTARTS:
        raise unsupported_setting(
            f"backend.jump: restart starts a trainer, which takes a minute, at each of the {jumps} jumps of this "
            "schedule; use swap, or a predictor and a schedule with fewer jumps"
        )


def _check_extra(config: OpenRlhfConfig, options: Options) -> None:
    """Raise ``ConfigError`` for an extra option that we set ourselves or cannot work with.

    OpenRLHF's parser accepts abbreviations, so an option may stand for any that it begins.
    """
    for option in (word.partition("=")[0] for word in config.extra_args if word.startswith("--")):
        ours = next((name for name in options if name.startswith(option)), None)
        if ours is not None:
            raise contradiction(f"backend.extra_args: {option} is set by {options[ours][0]}")
        for name, reason in REFUSED.items():
            if option.startswith(name) if name.endswith(".") else name.startswith(option):
                raise unsupported_setting(f"backend.extra_args: {option} is not supported: {reason}")


def _ring(config: OpenRlhfConfig) -> int:
    """Return the GPUs of a ring, which share the rollouts of one data-parallel rank."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ds.ring_attn_size", nargs="?", dest="size")
    size = parser.parse_known_args(config.extra_args)[0].size
    return int(size) if size and size.isdecimal() else 1  # OpenRLHF's own parser reports what is no number


def _lora(training: TrainingSettings) -> Options:
    lora, key = training.lora, "training.lora"
    if lora is None:
        return {f"--ds.lora.{name}": (key, None) for name in ("rank", "alpha", "target_modules")}
    targets: str | list[str] | None = lora.target_modules
    if lora.rslora:
        raise unsupported_setting(f"{key}.rslora: OpenRLHF has no rsLoRA; set alpha to alpha * sqrt(rank)")
    if lora.alpha != int(lora.alpha):
        raise unsupported_setting(f"{key}.alpha: OpenRLHF takes whole numbers only, not {lora.alpha:g}")
    if not targets or (isinstance(targets, str) and not re.fullmatch(r"all-linear|\w+", targets)):
        raise unsupported_setting(
            f"{key}.target_modules: OpenRLHF takes names of modules but no regular expression ('{targets}'); list the "
            "names, or leave it at all-linear"
        )
    if isinstance(targets, str):
        # all-linear is OpenRLHF's default; as an option it would become a list, which PEFT takes for a module's name.
        targets = None if targets == "all-linear" else [targets]
    return {
        "--ds.lora.rank": (f"{key}.rank", lora.rank),
        "--ds.lora.alpha": (f"{key}.alpha", int(lora.alpha)),
        "--ds.lora.target_modules": (f"{key}.target_modules", targets),
    }


def _micro_batch(training: TrainingSettings, config: OpenRlhfConfig) -> int:
    """Return the largest allowed micro-batch that divides the rollouts of a data-parallel rank in a step."""
    rollouts, ring = training.prompts_per_step * training.generations, _ring(config)
    if ring < 1 or config.gpus % ring:
        raise contradiction(
            f"backend.extra_args: --ds.ring_attn_size {ring} does not divide the {config.gpus} GPUs of the actor"
        )
    share, left = divmod(rollouts, config.gpus // ring)
    if left or not share:
        raise contradiction(
            f"the {rollouts} rollouts of a step (training.prompts_per_step * training.generations) cannot be shared "
            f"among {config.gpus // ring} data-parallel ranks (backend.gpus); make them a multiple"
        )
    return largest_divisor(share, config.micro_batch)


def _max_length(training: TrainingSettings, config: OpenRlhfConfig) -> int:
    longest: int = training.max_new_tokens + 1024
    positions = read_json(training.model / "config.json").get("max_position_embeddings")
    if isinstance(positions, int):
        longest = min(longest, positions)
    longest = config.max_length or longest
    if longest <= training.max_new_tokens:
        raise contradiction(
            f"backend.max_length: {longest} tokens leave no room for a prompt next to training.max_new_tokens "
            f"({training.max_new_tokens})"
        )
    return longest
