"""Accuracy without sampling: the exact probability of the right answer. Runs in every rank of the policy's actor."""

from typing import Any

import torch

BATCH = 64


@torch.no_grad()
def right_answers(forward: Any, model: Any, tokenizer: Any, pairs: list[list[str]]) -> float:
    """Return the mean probability that the policy answers exactly ``answer`` and the end token, over all
    (prompt, answer) pairs. ``forward`` calls ``model``.
    """
    training = model.training
    model.eval()
    total = 0.0
    try:
        for start in range(0, len(pairs), BATCH):
            total += float(_log_probabilities(forward, model, tokenizer, pairs[start : start + BATCH]).exp().sum())
    finally:
        model.train(training)
    return total / max(1, len(pairs))


def _log_probabilities(forward: Any, model: Any, tokenizer: Any, pairs: list[list[str]]) -> torch.Tensor:
    """Return log P(answer, end | prompt), (N,)."""
    asked = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt, _ in pairs]
    right = [
        [*tokenizer(str(answer), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, answer in pairs
    ]
    width, longest = max(len(a) + len(r) for a, r in zip(asked, right, strict=True)), max(map(len, right))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id or 0)
    seen, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (a, r) in enumerate(zip(asked, right, strict=True)):
        # Padded on the left, so that all answers end in the last column and few logits are needed.
        ids[row, width - len(a) - len(r) :] = torch.tensor([*a, *r])
        seen[row, width - len(a) - len(r) :] = 1
        answer[row, width - len(r) :] = True
    device = next(model.parameters()).device
    ids, seen, answer = ids.to(device), seen.to(device), answer.to(device)
    positions = (seen.cumsum(-1) - 1).clamp_min(0)
    output = forward(ids, attention_mask=seen, position_ids=positions, logits_to_keep=longest + 1)
    # The logits at one position predict the token at the next.
    found = output["logits"][:, -longest - 1 : -1].float().log_softmax(-1).gather(2, ids[:, -longest:, None])[..., 0]
    total: torch.Tensor = (found * answer[:, -longest:]).sum(1)
    return total
