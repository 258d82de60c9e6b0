"""``evaluate="reward"``: the probe is the trainer's own reward of greedy completions."""

import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from next_backends.trl.evaluate import greedy_accuracy
from next_core.errors import contradiction

MOST_PROMPTS = 256  # Prompts that a probe evaluates
SHARE = 10  # At most one of so many training prompts is held back


def prompts_of(trainer: Any) -> Any:
    """Return a dataset to evaluate on: from ``eval_dataset``, else prompts that are taken out of the training data.

    Called at the end of the trainer's constructor: it has no dataloader yet. The prompts are spread evenly over the
    dataset, which may be sorted, and are the same in every process and in a resumed run. Raises ``ConfigError``.
    """
    from datasets import Dataset

    data = trainer.eval_dataset
    if isinstance(data, dict):
        data = next(iter(data.values()))
    if data is not None:
        return Dataset.from_list(list(islice(data, MOST_PROMPTS)))
    data = trainer.train_dataset
    count = min(MOST_PROMPTS, len(data) // SHARE) if isinstance(data, Dataset) else 0
    if count == 0:
        raise contradiction(
            "evaluate='reward' finds no prompts: give the trainer an eval_dataset (none can be held back from a "
            f"train_dataset that is streamed or has fewer than {SHARE} rows)"
        )
    held = {index * len(data) // count for index in range(count)}
    trainer.train_dataset = data.select([index for index in range(len(data)) if index not in held])
    return data.select(sorted(held))


def reward_probe(trainer: Any, data: Any) -> Callable[[Any], float]:
    """Return ``model -> mean reward`` of one greedy completion for each prompt, by the trainer's reward functions.

    They are called as TRL calls them; their results are weighted by ``reward_weights``. Raises ``ConfigError`` for a
    trainer without such functions, or with one that only TRL itself can call.
    """
    functions = getattr(trainer, "reward_funcs", None)
    problem = "the trainer has no reward functions" if not functions else None
    for function in functions or ():
        if isinstance(function, nn.Module):
            problem = "a reward is a model"
        elif any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):  # noqa: B004
            problem = "a reward function is asynchronous"
    if getattr(trainer, "tools", None) or getattr(trainer, "environments", None):
        problem = "completions call tools"
    if problem is not None:
        raise contradiction(f"evaluate='reward': {problem}; pass a function of the model")
    assert functions is not None
    ours = {"trainer_state": trainer.state, "log_extra": _ignored, "log_metric": _ignored}

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        columns.pop("completion", None)
        if not isinstance(prompts[0], str):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        each = [function(prompts=prompts, completions=completions, **columns, **ours) for function in functions]
        table = torch.tensor([[float("nan") if one is None else one for one in some] for some in each])
        return list((table * trainer.reward_weights.cpu().unsqueeze(1)).nansum(dim=0).tolist())

    def probe(model: Any) -> float:
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        template = getattr(trainer, "chat_template_kwargs", None) or {}
        longest = getattr(trainer.args, "max_completion_length", None) or trainer.args.max_new_tokens  # online DPO
        return greedy_accuracy(model, tokenizer, data, reward, longest, **template)

    return probe


def _ignored(*_: Any) -> None:
    """Stand in for what a reward function logs during training."""
