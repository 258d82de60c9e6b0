"""Accuracy of a policy: exactly, where the right answer is one string, or by verified greedy completions."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from next_core.rewards import RewardFunction

BATCH = 512


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients. No random number is drawn, so that a measured run equals an unmeasured one."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Put the weights that a schedule-free optimizer returns (arXiv 2405.15682) in place of those it trains at.

    Afterwards training goes on from the same bits; other optimizers have no such mode.
    """
    if not hasattr(getattr(optimizer, "optimizer", optimizer), "eval"):
        yield
        return
    trained = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, value in trained:  # the way back is rounded
            parameter.data.copy_(value)


def likelihood_accuracies(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> dict[str, float]:
    """Return exact accuracies by teacher forcing, without sampling noise.

    ``sampled``: the mean probability of sampling exactly the answer and the end token; ``greedy``: the share of prompts
    for which greedy decoding gives exactly that.
    """
    sampled, greedy = 0.0, 0
    with _evaluating(model):
        for start in range(0, len(prompts), BATCH):
            pairs = list(zip(prompts[start : start + BATCH], answers[start : start + BATCH], strict=True))
            logps, likeliest = _answers(model, tokenizer, pairs)
            sampled += float(logps.exp().sum())
            greedy += int(likeliest.sum())
    count = max(1, len(prompts))
    return {"sampled": sampled / count, "greedy": greedy / count}


def _answers(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log P(answer, end | prompt) of each pair, (N,), and whether each of its tokens is the likeliest, (N,)."""
    asked = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    right = [
        [*tokenizer(str(answer), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, answer in pairs
    ]
    width = max(len(a) + len(r) for a, r in zip(asked, right, strict=True))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id or 0)
    seen = torch.zeros_like(ids)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, (a, r) in enumerate(zip(asked, right, strict=True)):
        ids[row, : len(a) + len(r)] = torch.tensor(a + r)
        seen[row, : len(a) + len(r)] = 1
        answer[row, len(a) : len(a) + len(r)] = True
    device = next(model.parameters()).device
    ids, seen, answer = ids.to(device), seen.to(device), answer.to(device)
    logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    right_ids = logits.argmax(-1) == ids[:, 1:]
    return (logps * answer[:, 1:]).sum(1), (right_ids | ~answer[:, 1:]).all(1)


def greedy_accuracy(
    model: Any, tokenizer: Any, data: Any, reward: RewardFunction, max_new_tokens: int, **template: Any
) -> float:
    """Return the mean reward of greedy completions; ``template`` goes to the tokenizer's chat template."""
    total = 0.0
    device = next(model.parameters()).device
    with _evaluating(model):
        for start in range(0, len(data), 64):
            rows = data[start : start + 64]
            prompts = [_as_text(tokenizer, prompt, template) for prompt in rows["prompt"]]
            text = isinstance(rows["prompt"][0], str)  # a chat template has written the special tokens already
            batch = tokenizer(
                prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=text
            ).to(device)
            batch.pop("token_type_ids", None)
            # Trainers switch the cache off where they recompute activations, which only training does.
            out = model.generate(
                **batch,
                do_sample=False,
                use_cache=True,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(out, skip_special_tokens=True)
            columns = {key: value for key, value in rows.items() if key != "prompt"}
            ids = [_until_end(row, tokenizer.eos_token_id) for row in out.tolist()]
            total += sum(reward(prompts=rows["prompt"], completions=texts, completion_ids=ids, **columns))
    return total / max(1, len(data))


def _until_end(ids: list[int], end: int) -> list[int]:
    """Return the tokens up to the end token, and without what pads them."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def _as_text(tokenizer: Any, prompt: Any, template: Mapping[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template))
