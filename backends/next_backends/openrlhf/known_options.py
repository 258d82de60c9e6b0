"""OpenRLHF's options as recorded from its parser: which are ours to set, which are refused, what is wrong with others.

``options.json`` is written by ``trainer_side/parse.py --record``, run by a Python that has OpenRLHF.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from next_core.errors import ConfigError

if TYPE_CHECKING:
    from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig

KNOWN = ("0.11.2",)
"""Releases of OpenRLHF that this backend drives."""
RECORD = Path(__file__).with_name("options.json")
TYPES = {"str": str, "int": int, "float": float}

OURS = {
    "--actor.adam.lr": "training.learning_rate",
    "--actor.gradient_checkpointing_enable": "backend.deepspeed.gradient_checkpointing",
    "--actor.lr_scheduler": "training.lr_scheduler",
    "--actor.model_name_or_path": "training.model",
    "--actor.num_gpus_per_node": "backend.gpus",
    "--actor.num_nodes": "backend.nodes",
    "--algo.advantage.estimator": "backend.estimator",
    "--algo.kl.estimator": "training.algorithm",
    "--algo.kl.init_coef": "training.beta",
    "--algo.kl.use_loss": "training.algorithm",
    "--ckpt.best_metric_key": "save_every",
    "--ckpt.disable_ds": "save_every",
    "--ckpt.max_num": "save_every",
    "--ckpt.load_enable": "`next-core run --resume`",
    "--ckpt.output_dir": "`next-core run --out`",
    "--ckpt.path": "`next-core run --out`",
    "--ckpt.save_hf": "backend.jump",
    "--ckpt.save_steps": "save_every",
    "--data.apply_chat_template": "training.data",
    "--data.input_key": "training.data",
    "--data.label_key": "training.data",
    "--data.max_len": "backend.max_length",
    "--data.max_samples": "steps",
    "--data.prompt_dataset": "training.data.train",
    "--ds.adam_offload": "backend.deepspeed.adam_offload",
    "--ds.attn_implementation": "backend.deepspeed.attention",
    "--ds.enable_sleep": "backend.vllm.sleep",
    "--ds.lora.alpha": "training.lora.alpha",
    "--ds.lora.rank": "training.lora.rank",
    "--ds.lora.target_modules": "training.lora.target_modules",
    "--ds.param_dtype": "backend.deepspeed.dtype",
    "--ds.zero_stage": "backend.deepspeed.zero_stage",
    "--ref.num_gpus_per_node": "backend.gpus",
    "--ref.num_nodes": "backend.nodes",
    "--reward.remote_url": "training.reward, or backend.reward_file",
    "--rollout.batch_size": "training.prompts_per_step",
    "--rollout.max_new_tokens": "training.max_new_tokens",
    "--rollout.micro_batch_size": "backend.micro_batch",
    "--rollout.n_samples_per_prompt": "training.generations",
    "--rollout.temperature": "training.temperature",
    "--train.batch_size": "training.prompts_per_step and training.generations",
    "--train.colocate_actor_ref": "backend.colocate",
    "--train.colocate_all": "backend.colocate",
    "--train.micro_batch_size": "backend.micro_batch",
    "--train.num_episodes": "steps",
    "--train.seed": "seed",
    "--vllm.enable_prefix_caching": "backend.vllm.prefix_caching",
    "--vllm.enable_sleep": "backend.vllm.sleep",
    "--vllm.enforce_eager": "backend.vllm.eager",
    "--vllm.gpu_memory_utilization": "backend.vllm.gpu_memory",
    "--vllm.num_engines": "backend.vllm.engines",
    "--vllm.sync_backend": "backend.vllm.sync",
    "--vllm.tensor_parallel_size": "backend.vllm.tensor_parallel",
}
"""Options that the run config sets in its own words, and where."""

_STALE = "weights would change while roll-outs of the old ones are under way"
_TEXT = "images are not trained on"
REFUSED = {
    "--actor.freeze_visual_encoder": _TEXT,
    "--actor.optim": "jumps reset Adam's state, and know no other optimizer's",
    "--data.input_template": "prompts that are measured would have none; write it into the data",
    "--data.max_images_per_prompt": _TEXT,
    "--ds.load_in_4bit": "the engines take base weights and adapter merged, which 4 bits cannot hold",
    "--ds.tensor_parallel_size": "weights cannot be moved where DeepSpeed splits each matrix; use ZeRO",
    "--ds.use_universal_ckpt": "universal checkpoints cannot be read back",
    "--local_rank": "Ray gives each process its rank",
    "--reward.model_name_or_path": "rewards are verifiable ones: training.reward, or backend.reward_file",
    "--rollout.vllm_generate_batch_size": "a step generates training.prompts_per_step prompts, no more and no less",
    "--train.agent_func_path": "an agent would stand in the place of training.reward",
    "--train.async_enable": _STALE,
    "--train.enable_ema": "what it saves is an average, not the weights that a jump moves",
    "--train.partial_rollout_enable": _STALE,
}
"""Options that the backend cannot drive, with the reason."""
NEUTRAL = {"--actor.optim": "adam", "--data.max_images_per_prompt": 0, "--ds.tensor_parallel_size": 1}
"""Values of refused options that change nothing."""


def check_options(arguments: Sequence[str]) -> None:
    """Raise ``ConfigError`` for an option that OpenRLHF does not have, or a value that it would not take."""
    _parse(arguments, "OpenRLHF's command line")


def check_extra(config: OpenRlhfConfig) -> dict[str, Any]:
    """The values of ``backend.extra_args`` by option."""
    given = _parse(config.extra_args, "backend.extra_args")
    for option, value in given.items():
        if option in OURS:
            raise ConfigError(f"backend.extra_args: {option} is set by {OURS[option]}")
        reason = REFUSED.get(option)
        if option.startswith("--critic."):
            reason = "no estimator of this backend has a critic"
        if option == "--algo.dynamic_filtering_enable" and config.jump == "merge":
            reason = "its steps take more prompts than planned, and `jump: merge` counts steps in prompts"
        if reason is not None and value != NEUTRAL.get(option):
            raise ConfigError(f"backend.extra_args: {option} cannot be: {reason}")
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


@functools.cache
def _parser() -> tuple[_Parser, list[str]]:
    """OpenRLHF's parser as recorded, giving only the options that are there, and their names."""
    recorded: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["options"]
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option, record in recorded.items():
        kind = {"type": TYPES[record["type"]]} if "type" in record else {}
        parser.add_argument(option, dest=option, **{**record, **kind})
    return parser, list(recorded)


def _parse(arguments: Sequence[str], where: str) -> dict[str, Any]:
    parser, names = _parser()
    try:
        given, unknown = parser.parse_known_args(list(arguments))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if unknown:
        option = unknown[0].partition("=")[0]
        if not option.startswith("-"):
            raise ConfigError(f"{where}: '{option}' belongs to no option")
        near = difflib.get_close_matches(option, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: OpenRLHF {KNOWN[-1]} has no option {option}{hint}")
    return vars(given)
