"""A real TRL trainer on the arithmetic base model, small enough for a test: a step is some 50 ms."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

EXAMPLES = Path(__file__).parents[3] / "examples"
BASE = EXAMPLES / "arithmetic" / "base"
SMALL_RUN: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 5,
    "beta": 0.0,
    "seed": 3,
}
"""Arguments of TRL's trainers for a run of seconds on a CPU."""
PROMPTS = ["12+34=", "97-15=", "50+50=", "83-82="]
SMALL = {"observe": 6, "every": 3, "horizon": 3, "settle": 2}  # A schedule with one jump after step 6
FACTORS = {"name": "secant", "window": 3, "space": "factors"}
MERGED = {"name": "secant", "window": 3, "space": "merged"}
SAVING = {"save_strategy": "steps", "save_steps": 4}
KINDS = {"factors": (FACTORS, True), "merged": (MERGED, True), "full": (MERGED, False)}
of_each_kind = pytest.mark.parametrize(("predictor", "lora"), KINDS.values(), ids=KINDS)


def jumping(predictor: Any = FACTORS, **fields: Any) -> Any:
    """A callback with one jump after step 6, unless ``fields`` say otherwise."""
    from next_backends.trl import PredictExtendCallback  # it imports TRL, which a shim may have to precede

    return PredictExtendCallback(predictor, **SMALL | fields)


def adapted(config: Any = None) -> Any:
    """The base model with an adapter, by default LoRA's on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config or lora)


class Watch(TrainerCallback):
    """Calls ``look(step, model)`` when a step has ended: before the jump's callback or after it, as it is listed."""

    def __init__(self, look: Callable[[int, Any], None]) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(state.global_step, kwargs["model"])


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def fixed_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Logits of fixed prompts, in evaluation mode."""
    batch = tokenizer(PROMPTS, return_tensors="pt")
    training = model.training
    model.eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(training)
    return out.double()


def build(
    tokenizer: Any,
    out: Path,
    callbacks: list[Any] | None = None,
    steps: int = 12,
    lora: bool | dict[str, Any] = True,
    rloo: bool = False,
    model: Any = None,
    reward: Any = exact,
    eval_rows: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> Any:
    """A trainer that writes into ``out``; ``fields`` are those of GRPOConfig."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 40) for b in range(10, 30)]
    settings = SMALL_RUN | {"output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 8} | fields
    set_seed(3)
    config_class, trainer_class = (RLOOConfig, RLOOTrainer) if rloo else (GRPOConfig, GRPOTrainer)
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    trainer = trainer_class(
        model=model if model is not None else AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        reward_funcs=reward,
        args=config_class(**settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**(adapter | (lora if isinstance(lora, dict) else {}))) if lora else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture
def logits(tokenizer: Any) -> Callable[[Any], torch.Tensor]:
    return lambda model: fixed_logits(model, tokenizer)


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """``make_trainer(callbacks=[...], steps=12, lora=True, rloo=False, **GRPOConfig fields)``."""

    def make(callbacks: list[Any] | None = None, *, out: str = "trainer", **fields: Any) -> Any:
        return build(tokenizer, tmp_path / out, callbacks, **fields)

    return make


@pytest.fixture(scope="session")
def plain_logits(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., torch.Tensor]:
    """``plain_logits(steps, lora)``: what a run without our callback ends in; each is trained once."""

    @functools.cache
    def train(steps: int, lora: bool) -> torch.Tensor:
        trainer = build(tokenizer, tmp_path_factory.mktemp("plain"), steps=steps, lora=lora)
        trainer.train()
        return fixed_logits(trainer.model, tokenizer)

    return train


@pytest.fixture
def trained() -> Callable[[Any], dict[str, torch.Tensor]]:
    """A copy of everything that trains."""

    def copy(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    return copy
