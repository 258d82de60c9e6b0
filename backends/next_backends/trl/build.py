"""Builds a TRL trainer from a run config: model, LoRA, data, reward, arguments."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from next_backends.data import read_rows, read_splits
from next_backends.history_folder import numbered
from next_backends.trl.argument_checks import check_arguments
from next_backends.trl.evaluate import greedy_accuracy, likelihood_accuracies
from next_core.config import with_model_folder
from next_core.errors import CheckpointError, ConfigError, contradiction, describe, invalid_value
from next_core.plugins import import_object, make_chosen
from next_core.process.optional_packages import import_optional
from next_core.rewards import RewardFunction, make_reward
from next_core.storage.manifest import MANIFEST, check_manifest

if TYPE_CHECKING:
    from next_core.run_config import Choice, RunConfig, TrainingSettings

Evaluate = Callable[[Any, str], dict[str, float]]


def build_trainer(
    run: RunConfig, extra: dict[str, Any], output: Path, optimizer: Choice | None = None
) -> tuple[Any, Evaluate]:
    """Return the trainer and a function that measures a split. Raises ``ConfigError`` or ``BackendError``."""
    for package in ("transformers", "peft", "datasets", "trl"):
        import_optional(package, "trl")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, set_seed
    from trl import GRPOTrainer, RLOOTrainer

    training = with_model_folder(run).training
    reward = make_reward(training.reward)
    args = make_args(run, extra, output)
    check_arguments(make_chosen("predictor", run.predictor), run.schedule, run.guards, run.steps, args)
    train, splits = _load_data(training)
    set_seed(run.seed)
    try:
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(training.model, **local)
        model = AutoModelForCausalLM.from_pretrained(training.model, dtype=torch.float32, **local)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{training.model} cannot be loaded as a model: {describe(error)}", kind="checkpoint-unknown-layout"
        ) from None
    lora = training.lora and LoraConfig(
        r=training.lora.rank,
        lora_alpha=training.lora.alpha,
        target_modules=training.lora.target_modules,
        use_rslora=training.lora.rslora,
        task_type="CAUSAL_LM",
    )
    trainer_class = RLOOTrainer if training.algorithm == "rloo" else GRPOTrainer
    try:
        trainer = trainer_class(
            model=model,
            reward_funcs=[_named(reward, training.reward.name)],
            args=args,
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=lora,
        )
    except ValueError as error:
        raise invalid_value(f"TRL refuses the settings: {describe(error)}") from None
    if optimizer is not None:
        settings = {"lr": training.learning_rate, **optimizer.fields}
        trainer.optimizer_cls_and_kwargs = import_object(optimizer.name), settings
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    def evaluate(model: Any, split: str) -> dict[str, float]:
        data = splits.get(split)
        if data is None:
            return {}
        if training.evaluation == "likelihood":
            return likelihood_accuracies(model, tokenizer, data["prompt"], data["answer"])
        return {"greedy": greedy_accuracy(model, tokenizer, data, reward, training.max_new_tokens)}

    return trainer, evaluate


def make_args(run: RunConfig, extra: dict[str, Any], output: Path) -> Any:
    """Return TRL's config. ``extra`` is passed through, except for what the run config sets itself."""
    from trl import GRPOConfig, RLOOConfig

    training = run.training
    config_class = RLOOConfig if training.algorithm == "rloo" else GRPOConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    ours: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": run.steps,
        "seed": run.seed,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler,
        "num_generations": training.generations,
        "max_completion_length": training.max_new_tokens,
        "temperature": training.temperature,
        "beta": training.beta,
        "save_strategy": "no" if run.save_every is None else "steps",
        "save_steps": run.save_every or run.steps,
    }
    for key in extra:
        if key in ours:
            raise contradiction(f"backend.args.{key}: set this in `training`, `steps` or `seed` of the run config")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"backend.args.{key}: {config_class.__name__} has no such field"
                + (f"; did you mean '{near[0]}'?" if near else ""),
                kind="config-unknown-key",
            )
    fields: dict[str, Any] = ours | {
        "per_device_train_batch_size": training.prompts_per_step * training.generations,
        "logging_steps": run.schedule.every,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if training.algorithm == "reinforce++":
        # REINFORCE++ normalises advantages over the whole batch; TRL keeps the group's mean as the baseline.
        fields |= {"scale_rewards": "batch"}
    try:
        made = config_class(**(fields | extra))
    except (ValueError, TypeError) as error:
        raise invalid_value(f"TRL's {config_class.__name__} refuses the settings: {describe(error)}") from None
    a_step = made.per_device_train_batch_size * made.gradient_accumulation_steps * made.world_size
    if a_step != training.prompts_per_step * training.generations:
        raise contradiction(
            f"backend.args make a step of {a_step} roll-outs, but prompts_per_step * generations is "
            f"{training.prompts_per_step * training.generations}; choose per_device_train_batch_size and "
            "gradient_accumulation_steps with that product"
        )
    return made


def last_checkpoint(folder: Path, before: int | None = None) -> tuple[Path | None, int, list[str]]:
    """Return the trainer's newest complete ``checkpoint-N``, N, and what is wrong with newer ones.

    A checkpoint is complete if it was sealed and its files are still the same. ``before`` restricts the search to
    earlier steps. Returns (None, 0, notes) where there is none.
    """
    notes: list[str] = []
    for number, path in reversed(numbered(folder, "checkpoint-*")):
        if not (path / MANIFEST).exists() or (before is not None and number >= before):
            continue  # not sealed: the process was killed while writing it
        try:
            check_manifest(path, contents=True)
        except CheckpointError as error:
            notes.append(error.message)
            continue
        return path, number, notes
    return None, 0, notes


def _load_data(training: TrainingSettings) -> tuple[Any, dict[str, Any]]:
    from datasets import Dataset

    splits = {split: Dataset.from_list(rows) for split, rows in read_splits(training).items()}
    return Dataset.from_list(read_rows(training.data.train)), splits


def _named(reward: RewardFunction, name: str) -> Callable[..., list[float]]:
    """Return a reward function with its own name, which TRL requires."""

    def function(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return reward(prompts=prompts, completions=completions, **columns)

    function.__name__ = name.replace("-", "_").replace(":", "_")
    return function
