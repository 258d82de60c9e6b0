"""Decode from extrapolated logits of two adapters of one model; nothing is trained and no weights are written."""

from typing import Any

import torch
from torch import Tensor


def generate_extrapolated(model: Any, first: str, second: str, a: float = 1.5, **settings: Any) -> Any:
    """Return ``model.generate(**settings)`` with the logits l_1 + a (l_2 - l_1) of two adapters of a PEFT model.

    ``first`` and ``second`` are the names of the earlier and the later checkpoint's adapter; a = 1 decodes with
    ``second`` alone. Greedy decoding and sampling, not beams; prompts are padded on the left, with an
    ``attention_mask``. A token costs two forward passes. Source: RL-Extra, arXiv 2601.04537, with a = 1.5 there.
    """
    active, trained = list(model.base_model.active_adapters), [p for p in model.parameters() if p.requires_grad]
    processor = _Extrapolation(model, first, second, a, settings.get("attention_mask"))
    settings["logits_processor"] = [*settings.get("logits_processor", ()), processor]
    try:
        model.set_adapter(second)
        return model.generate(**settings)
    finally:
        model.base_model.set_adapter(active)
        model.requires_grad_(False)  # activating an adapter makes it trainable
        for parameter in trained:
            parameter.requires_grad_(True)


class _Extrapolation:
    """A logits processor: called with all tokens so far and l_2, it runs the first adapter with a cache of its own."""

    def __init__(self, model: Any, first: str, second: str, a: float, mask: Tensor | None) -> None:
        self.model, self.first, self.second, self.a, self.mask = model, first, second, a, mask
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return l_1 + a (l_2 - l_1), both (batch, vocabulary)."""
        mask = torch.ones_like(input_ids)
        if self.mask is not None:
            mask[:, : self.mask.shape[1]] = self.mask
        new = input_ids if self.cache is None else input_ids[:, -1:]
        self.model.set_adapter(self.first)
        made = self.model(
            input_ids=new,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.model.set_adapter(self.second)
        self.cache = made.past_key_values
        l_1: Tensor = made.logits[:, -1].to(scores)
        return l_1 + self.a * (scores - l_1)
