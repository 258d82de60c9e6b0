"""Every layout of checkpoints with every predictor and applier: the weights are exact, or there is an error of a kind.

python -m tests.appliers.matrix   # writes the table of docs/exporting.md anew
"""

import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from next_core import History, make_applier, make_predictor, open_checkpoints
from next_core.errors import NextCoreError
from next_core.interfaces import CheckpointSource, LowRankUpdate, Prediction
from next_core.plugins import registry, trajectory_predictors
from tests.conftest import noise
from tests.sources.models import SMALL, built

PAGE = Path(__file__).parents[2] / "docs" / "exporting.md"
BEGIN, END = "<!-- table: made by python -m tests.appliers.matrix -->", "<!-- end of table -->"
STEPS = (10, 20, 30, 40, 50, 60)
HORIZON = 10
SETTINGS: dict[str, dict[str, Any]] = {"next-mlp": {"epochs": 20, "hidden": 8}, "next-mlp-reduced": {"epochs": 20}}
NO_JUMP = ("stay", "effopd")  # The control, and the one that jumps at powers of two only, of which 60 is none
QUICK = ("relex", "secant")  # One that counts from the backbone and one that does not; the command above compares all
APPLIERS = ("peft-adapter", "merged-model", "in-memory")
EXACT = "exact"
TOLERANCE = 2e-5
QWEN2 = ("Qwen2ForCausalLM", "Qwen2Config", SMALL | {"num_key_value_heads": 1})
GPT2 = ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 32})
MOE = (
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    QWEN2[2] | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8},
)
LLAVA = (
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    {
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": {k: v for k, v in SMALL.items() if k != "vocab_size"}
        | {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2},
        "image_token_index": 3,
    },
)
IN_MEMORY = {"save_original_format": False}


@dataclass(frozen=True)
class Layout:
    """A way to store a run: its model, how PEFT trains it (None: all weights), how checkpoints and base are saved."""

    model: tuple[str, str, dict[str, Any]] = QWEN2
    lora: dict[str, Any] | None = None
    save: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    backbone: bool = True
    dtype: torch.dtype = torch.float32
    change: Callable[[Path], object] = lambda folder: None
    """What is done to the folder of the base model afterwards."""

    def build(self) -> Any:
        name, config, sizes = self.model
        return built(name, config, **sizes)


def quantize(folder: Path) -> None:
    """Make a base model look as bitsandbytes stores it."""
    tensors = load_file(folder / "model.safetensors")
    coded = {k: torch.zeros(v.numel() // 2, 1).to(torch.uint8) for k, v in tensors.items() if "proj.weight" in k}
    scales = {f"{name}.absmax": torch.ones(1) for name in coded}
    save_file(tensors | coded | scales, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config | settings))


def enlarge(folder: Path) -> None:
    """Replace a base model by one with a larger vocabulary."""
    Layout(model=(*QWEN2[:2], QWEN2[2] | {"vocab_size": 35})).build().save_pretrained(folder)


ALL: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}}
TIED = (*QWEN2[:2], QWEN2[2] | {"tie_word_embeddings": True})
LAYOUTS: dict[str, Layout] = {
    "LoRA": Layout(lora=ALL),
    "LoRA, patterns and rank-stabilised": Layout(lora=ALL | PATTERNS),
    "LoRA, with a whole module": Layout(lora=ALL | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "LoRA of GPT-2": Layout(GPT2, ALL | {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "LoRA, no backbone": Layout(lora=ALL, backbone=False),
    "LoRA, 4-bit backbone": Layout(lora=ALL, change=quantize),
    "LoRA of a vision-language model": Layout(LLAVA, ALL | {"target_modules": r".*language_model.*\.(q|up)_proj"}),
    "whole model": Layout(),
    "whole model, shards": Layout(save={"max_shard_size": "4KB"}),
    "whole model, tied head": Layout(TIED),
    "whole model, bf16": Layout(dtype=torch.bfloat16),
    "whole model, no backbone": Layout(backbone=False),
    "whole model, 4-bit backbone": Layout(change=quantize),
    "whole model, other vocabulary": Layout(change=enlarge),
    "GPT-2": Layout(GPT2),
    "experts one by one": Layout(MOE),
    "experts in stacks": Layout(MOE, save=IN_MEMORY),
    "experts in stacks, backbone one by one": Layout(MOE, save=IN_MEMORY, base={}),
    "vision-language model": Layout(LLAVA),
    "vision-language model, other names than the backbone": Layout(LLAVA, save=IN_MEMORY, base={}),
}


class Run:
    """A run in one layout, on disk, and where each matrix really was."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.layout, self.folder = layout, folder
        # A run under the names in memory is compared under these, whatever its backbone's are.
        self.named = type(layout.build()) if layout.save == IN_MEMORY else None
        self.factors: dict[int, dict[str, tuple[Tensor, Tensor, float]]] = {}
        self.values: dict[int, dict[str, Tensor]] = {}
        layout.build().to(layout.dtype).save_pretrained(
            folder / "base", **(layout.save if layout.base is None else layout.base)
        )
        if layout.lora is None:
            self._write_models()
        else:
            self._write_adapters(layout.lora)
        layout.change(folder / "base")

    @torch.no_grad()
    def _write_models(self) -> None:
        model = self.layout.build()
        began = {name: value.clone() for name, value in model.named_parameters()}
        for step in STEPS:
            for name, value in model.named_parameters():
                value.copy_(began[name] + 1e-3 * curve(name, step, value))
            target = self.folder / "checkpoints" / f"checkpoint-{step}"
            model.to(self.layout.dtype).save_pretrained(target, **self.layout.save)
            model.float()
            self.values[step] = stored(target, self.named)
        self.values[0] = stored(self.folder / "base", self.named)

    @torch.no_grad()
    def _write_adapters(self, config: dict[str, Any]) -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(self.layout.build(), LoraConfig(**config))
        start = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        for step in (0, *STEPS):
            for name, value in model.named_parameters():
                if name in start:
                    value.copy_(start[name] + 1e-2 * curve(name, step, value))
            model.save_pretrained(self.folder / "checkpoints" / f"checkpoint-{step}")
            self.factors[step] = {
                f"{name}.weight": (
                    layer.lora_A["default"].weight.double(),
                    layer.lora_B["default"].weight.double(),
                    layer.scaling["default"],
                )
                for name, layer in lora_layers(model)
            }

    def open(self) -> CheckpointSource:
        return open_checkpoints(self.folder / "checkpoints", self.folder / "base" if self.layout.backbone else None)

    def live(self) -> Any:
        """The model in memory as it was at the newest checkpoint."""
        newest = self.folder / "checkpoints" / f"checkpoint-{STEPS[-1]}"
        if self.layout.lora is None:
            return type(self.layout.build()).from_pretrained(newest, dtype=self.layout.dtype)
        from peft import PeftModel

        return PeftModel.from_pretrained(self.layout.build(), newest, is_trainable=True)

    def wanted(self, prediction: Prediction, name: str) -> Tensor:
        """Where a matrix is after the jump, by hand: from the backbone for LoRA, the whole weight otherwise."""
        update, scale = prediction.updates.get(name), prediction.weight(name)
        newest = self._position(name, STEPS[-1])
        if update is None:
            return newest
        began = self._position(name, 0)
        reached = newest - began if prediction.anchor == "backbone" else 0.0
        if isinstance(update, LowRankUpdate):
            return newest + scale * (update.matrix.dense().double() - reached)
        weights = {step: weight for step, weight in update.weights.items() if step}
        if self.layout.lora is None or update.space == "merged":
            moved = sum(weight * (self._position(name, step) - began) for step, weight in weights.items())
            return newest + scale * (moved - reached)
        if prediction.anchor == "backbone":
            weights[STEPS[-1]] = weights.get(STEPS[-1], 0.0) - 1.0
        (A, B, scaling), (A_0, B_0, _) = self.factors[STEPS[-1]][name], self.factors[0][name]
        for step, weight in weights.items():
            A = A + scale * weight * (self.factors[step][name][0] - A_0)
            B = B + scale * weight * (self.factors[step][name][1] - B_0)
        return scaling * B @ A

    def _position(self, name: str, step: int) -> Tensor:
        if self.layout.lora is not None:
            A, B, scaling = self.factors[step][name]
            return scaling * B @ A
        whole = self.values[step].get(name)
        return torch.zeros(()).double() if whole is None else whole.double()  # a tied head that the base has alone

    def read(self, applier: str, out: Any) -> Mapping[str, Tensor]:
        """What an applier wrote, as ``wanted`` counts it."""
        if self.layout.lora is None:
            return dict(split(out.state_dict())) if applier == "in-memory" else stored(out, self.named)
        if applier == "merged-model":
            base = stored(self.folder / "base", type(self.layout.build()))
            transposed = self.layout.model is GPT2
            moved = {name: value - base[name] for name, value in stored(out, type(self.layout.build())).items()}
            return {name: value.T if transposed and value.dim() == 2 else value for name, value in moved.items()}
        if applier == "peft-adapter":
            from peft import PeftModel

            out = PeftModel.from_pretrained(self.layout.build(), out)
        transposed = self.layout.model is GPT2  # PEFT's delta is that of the stored weight
        found = {}
        for name, layer in lora_layers(out):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A)
            found[f"{name}.weight"] = delta.T if transposed else delta
        return found


def curve(name: str, step: int, like: Tensor) -> Tensor:
    """How far a tensor has moved: along a line, with noise."""
    return step**0.9 * noise(name, *like.shape) + (step > 0) * noise(f"{name}{step}", *like.shape)


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A"))


def split(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        stack = value.dim() == 3
        yield from ((f"{name}[{index}]", each) for index, each in enumerate(value)) if stack else [(name, value)]


def stored(folder: Path, kind: type[nn.Module] | None = None) -> dict[str, Tensor]:
    """The tensors of a folder by their names in its files, or, given a class, as transformers loads them."""
    if kind is not None:
        return dict(split(kind.from_pretrained(folder).state_dict()))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return dict(split(tensors))


def outcome(run: Run, predict: Callable[[], Prediction], applier: str, out: Path) -> str:
    """Return ``exact``, or the kind of the error. Raises ``AssertionError`` for wrong weights."""
    try:
        prediction = predict()
        target = run.live() if applier == "in-memory" else out
        make_applier(applier).apply(prediction, out=target)
    except NextCoreError as error:
        return error.kind
    written = run.read(applier, target)
    for parameter in prediction.source.parameters:
        wanted, found = run.wanted(prediction, parameter.name), written[parameter.name].double()
        if run.layout.dtype is not torch.float32:
            wanted = wanted.to(run.layout.dtype).double()
        coarse = 2**-7 if run.layout.dtype is torch.bfloat16 else 0.0
        assert torch.allclose(found, wanted, rtol=coarse, atol=TOLERANCE), (
            parameter.name,
            (found - wanted).abs().max(),
        )
    return EXACT


def cells(layout: str, predictors: tuple[str, ...], folder: Path) -> dict[tuple[str, str], str]:
    """Return the outcome of each predictor and applier on one layout."""
    run, found = Run(LAYOUTS[layout], folder), {}

    def fitted(name: str) -> Prediction:
        return make_predictor(name, **SETTINGS.get(name, {})).fit(History(run.open())).predict(HORIZON)

    for predictor in predictors:
        once = functools.cache(functools.partial(fitted, predictor))
        for applier in APPLIERS:
            found[predictor, applier] = outcome(run, once, applier, folder / f"{predictor}-{applier}")
    return found


def summary(outcomes: Mapping[str, str]) -> str:
    """One cell of the table: what most predictors have, and who differs."""
    usual = Counter(outcomes.values()).most_common(1)[0][0]
    parts = [usual if usual == EXACT else f"`{usual}`"]
    for other in dict.fromkeys(outcomes.values()):
        if other != usual:
            names = ", ".join(name for name, each in outcomes.items() if each == other)
            parts.append(f"{names}: {other if other == EXACT else f'`{other}`'}")
    return "; ".join(parts)


def row(found: Mapping[tuple[str, str], str]) -> str:
    """One line of the table, without the layout."""
    columns = ({name: each for (name, of), each in found.items() if of == applier} for applier in APPLIERS)
    return f"{' | '.join(map(summary, columns))} |"


def predictors() -> tuple[str, ...]:
    """Our predictors that jump at the newest step."""
    known = registry()
    reading = trajectory_predictors()[0]
    own = (name for name in reading if known.get("predictor", name).__module__.startswith("next_"))
    return tuple(name for name in own if name not in NO_JUMP)


def documented() -> dict[str, dict[str, str]]:
    """The table of the page: by layout and applier the cell."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {name: dict(zip(APPLIERS, rest, strict=True)) for first, *rest in rows[1:] for name in first.split("; ")}


def outcome_in(cell: str, predictor: str) -> str:
    """The outcome of one predictor that a cell states."""
    usual, *others = cell.replace("`", "").split("; ")
    named = (other.split(": ") for other in others)
    return next((each for names, each in named if predictor in names.split(", ")), usual)


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        alike: dict[str, list[str]] = {}
        for i, name in enumerate(LAYOUTS):
            alike.setdefault(row(cells(name, predictors(), Path(scratch) / str(i))), []).append(name)
    rows = [f"| {'; '.join(names)} | {rest}" for rest, names in alike.items()]
    headings = [f"| checkpoints | {' | '.join(f'`{name}`' for name in APPLIERS)} |", "|---" * (1 + len(APPLIERS)) + "|"]
    head, _, rest = (before := PAGE.read_text()).partition(BEGIN)
    after = "\n".join([f"{head}{BEGIN}", "", *headings, *rows, "", f"{END}{rest.partition(END)[2]}"])
    if "--check" not in sys.argv:
        PAGE.write_text(after)
    elif after != before:
        print(f"{PAGE} has another table; run python -m tests.appliers.matrix", file=sys.stderr)
    return int("--check" in sys.argv and after != before)


if __name__ == "__main__":
    sys.exit(main())
