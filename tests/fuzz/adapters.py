"""``python -m tests.fuzz.adapters``: random PEFT configs, extrapolated and loaded by plain PEFT.

A draw is a model, a PEFT config and checkpoints that drift linearly. ``extrapolate`` then moves them in both
spaces with each applier. The logits of what it wrote are those of a model built by hand, or it refused with a kind.
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from next_core import open_checkpoints
from next_core.errors import NextCoreError
from next_core.notebook import extrapolate

STEPS = (10, 20)
SPACES = ("factors", "merged")
APPLIERS = ("peft-adapter", "merged-model")
TOLERANCE = 1e-5
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
NAMES = {
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
"""The linear layers of each model, by the ends of their names."""


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"kasa_config": {}},
    {"init_lora_weights": "pissa"},
    {"alora_invocation_tokens": [1]},
]


@dataclass
class Draw:
    """One random case: which model, PEFT's config, and the seed of weights and drift."""

    seed: int
    model: str
    lora: dict[str, Any]
    adapter: str
    alpha: float
    start: bool
    targets: list[str] = field(default_factory=list)


def draw(seed: int) -> Draw:
    """Return a case; the seed determines it."""
    random = Random(f"adapter {seed}")
    model = random.choice(["qwen2", "qwen2 tied", "gpt2", "moe"])
    names = NAMES[model.split()[0]]
    embedding = "wte" if model == "gpt2" else "embed_tokens"
    targets = random.sample(names, random.randint(1, len(names)))
    lora: dict[str, Any] = {
        "r": random.randint(1, 4),
        "lora_alpha": random.choice([1, 4, 7, 16]),
        "use_rslora": random.random() < 0.3,
        "bias": random.choice(["none"] * 4 + ["all", "lora_only"]),
        "target_modules": list(targets),
    }
    if random.random() < 0.2:
        lora["lora_bias"] = True
    if random.random() < 0.4:
        inside = "mlp" if model == "gpt2" else "self_attn"
        ends = [random.choice([f"1.{inside}.{target}", target]) for target in targets]
        lora["rank_pattern"] = {end: random.randint(1, 5) for end in random.sample(ends, random.randint(1, len(ends)))}
    if random.random() < 0.4:
        lora["alpha_pattern"] = {random.choice(targets): random.choice([2, 5, 9])}
    if model == "moe" and random.random() < 0.7:
        both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora["target_parameters"] = random.choice([["experts.gate_up_proj"], ["experts.down_proj"], both])
        lora.pop("lora_bias", None)
        if random.random() < 0.3:
            lora.setdefault("rank_pattern", {})["experts.down_proj"] = random.randint(1, 3)
    kind = random.random()
    if kind < 0.15:
        lora["modules_to_save"] = [random.choice(["lm_head", embedding])]
        lora["ensure_weight_tying"] = "tied" in model and random.random() < 0.5
    elif kind < 0.4 and not lora.get("lora_bias"):
        lora["target_modules"].append(embedding)
        lora["ensure_weight_tying"] = "tied" in model and random.random() < 0.7
    elif kind < 0.5:
        lora["trainable_token_indices"] = [1, 3]
    elif kind < 0.55:
        lora |= random.choice(VARIANTS)
    adapter = random.choice(["default", "default", "policy"])
    return Draw(seed, model, lora, adapter, random.choice([0.5, 1.0, 2.0]), random.random() < 0.5, targets)


@cache
def base_model(name: str, folder: Path) -> nn.Module:
    """Return a random model, saved to a folder of its name."""
    import transformers

    torch.manual_seed(len(name))
    more = {"initializer_range": 0.3, "tie_word_embeddings": "tied" in name or name == "gpt2"}
    config: Any
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16, **more)
    elif name == "moe":
        experts = {"moe_intermediate_size": 6, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
        config = transformers.Qwen3MoeConfig(**SIZES, **HEADS, **experts, **more)
    else:
        config = transformers.Qwen2Config(**SIZES, **HEADS, **more)
    config._experts_implementation = "eager"  # the others have no fp64
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder / name)  # type: ignore[operator]
    return model


def write_run(case: Draw, base: nn.Module, folder: Path) -> None:
    """Write checkpoints of PEFT's own: every trained tensor moves along a line of its own."""
    from peft import KasaConfig, LoraConfig, get_peft_model

    lora = dict(case.lora)
    if "kasa_config" in lora:
        lora["kasa_config"] = KasaConfig()
    torch.manual_seed(case.seed)
    model: Any = get_peft_model(
        copy.deepcopy(base), LoraConfig(**lora, task_type="CAUSAL_LM"), adapter_name=case.adapter
    )
    model.create_or_update_model_card = lambda folder: None  # a fifth of the time
    shared: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            shared.setdefault(parameter.data_ptr(), parameter)
    lines = [(p, 0.2 * torch.randn_like(p), 0.01 * torch.randn_like(p)) for p in shared.values()]
    for step in (*((0,) if case.start else ()), *STEPS):
        with torch.no_grad():
            for parameter, at, along in lines:
                parameter.copy_(at + step * along)
        model.save_pretrained(folder / f"checkpoint-{step}")


def by_hand(case: Draw, base: nn.Module, folder: Path, space: str) -> Tensor:
    """Return the logits of the newest checkpoint in plain PEFT, with each linear layer moved by explicit arithmetic."""
    import peft

    where = "" if case.adapter == "default" else case.adapter
    places = [folder / f"checkpoint-{step}" / where for step in STEPS]
    models = [peft.PeftModel.from_pretrained(copy.deepcopy(base), place).double() for place in places]
    before, model = (dict(m.named_modules()) for m in models)
    for name, layer in model.items():
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        A0, B0 = before[name].lora_A["default"].weight, before[name].lora_B["default"].weight
        if space == "factors":
            A.data, B.data = A + case.alpha * (A - A0), B + case.alpha * (B - B0)
        elif getattr(layer, "num_experts", 1) > 1:
            weight, r, experts = layer.get_param(), layer.r["default"], layer.num_experts
            for e in range(experts):
                rows, columns = slice(e * r, (e + 1) * r), slice(e, None, experts)
                moved = case.alpha * s * (B[:, columns] @ A[rows] - B0[:, columns] @ A0[rows])
                weight.data[e] += moved if layer._did_swap_in_out_features else moved.T
        else:  # adapters of a part of the tokens cannot be written into the weight
            A.data, B.data = torch.cat([A, A0]), torch.cat([B + case.alpha * B, -case.alpha * B0], 1)
    heads = [m for n, m in model.items() if n.endswith("lm_head") and "default" in getattr(m, "lora_A", {})]
    tables = [m for m in model.values() if "default" in getattr(m, "lora_embedding_A", {})]
    if case.lora.get("ensure_weight_tying") and heads and tables:
        tables[0].lora_embedding_A["default"].data = heads[0].lora_B["default"].weight.data.T
        tables[0].lora_embedding_B["default"].data = heads[0].lora_A["default"].weight.data.T
    return logits(models[1])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.double().eval()(input_ids=torch.arange(16).reshape(2, 8)).logits
    return out


def check(case: Draw, folder: Path) -> dict[str, str]:
    """Return for each space and applier ``exact``, or the kind of the refusal. Raises ``AssertionError`` for others.

    A config that PEFT does not accept has one outcome, which says so.
    """
    import peft
    from transformers import AutoModelForCausalLM

    base = base_model(case.model, folder)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    try:
        write_run(case, base, run)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return {"config": f"PEFT: {type(error).__name__}"}
    found = {}
    for space in SPACES:
        expected: Tensor | None = None
        for name in APPLIERS:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            try:
                source = open_checkpoints(run, backbone=folder / case.model)
                extrapolate(source, {"name": "secant", "space": space}, 10, out, alpha=case.alpha, applier=name)
            except NextCoreError as error:
                found[f"{space} {name}"] = str(error.kind)
                continue
            if name == "peft-adapter":
                wrote: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)
            else:
                wrote = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager")
            expected = by_hand(case, base, run, space) if expected is None else expected
            error = float((logits(wrote) - expected).abs().max() / expected.abs().max())
            assert error < TOLERANCE, f"{space} {name}: off by {error:.2g}: {case}"
            found[f"{space} {name}"] = "exact"
    return found


def fuzz(folder: Path, seeds: range) -> Counter[str]:
    """Check a case for each seed. Return how often each outcome came up, configs that PEFT refuses included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Counter(outcome for seed in seeds for outcome in check(draw(seed), folder).values())


def main() -> int:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.adapters", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(Path(folder), range(given.seed, given.seed + given.cases))
    print(json.dumps(outcomes))
    return int(outcomes["exact"] < outcomes.total() / 2)


if __name__ == "__main__":
    sys.exit(main())
