"""What test_sharded.py starts in two processes: short GRPO runs under one MODE, and what the oracle saw of them.

``cells.py OUT MODE CELL...`` writes ``OUT/MODE/CELL.rank0.pt`` and ``OUT/MODE/CELL.rank1.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback, set_seed

from tests.backends.trl.distributed import oracle

BASE = Path(__file__).parents[4] / "examples" / "arithmetic" / "base"
RANK = int(os.environ.get("RANK", "0"))
RATE = 1e-3
JUMP = {"observe": 4, "every": 2, "horizon": 2, "alpha": 4.0, "settle": 2}
"""A schedule with one jump after step 4, by four times the motion of the last two steps."""
FACTORS = {"name": "secant", "window": 2, "space": "factors"}
MERGED = {"name": "secant", "window": 2, "space": "merged"}
SCALE = {"name": "step-scale", "block": 2}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SAVING = {"save_strategy": "steps", "save_steps": 5}
MISSED = range(16, 20)
"""Steps whose roll-outs earn nothing in the run whose reward collapses."""


def make_base(folder: Path) -> None:
    """Write a model of 20,000 random parameters with the arithmetic task's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(BASE, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)


def low_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "01234" for c in text) / 4 for text in completions]


def collapsing(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    return [reward * (trainer_state.global_step not in MISSED) for reward in low_digits(completions)]


class Probe:
    """Returns accuracies from a list, after a forward pass as a user's probe makes it."""

    def __init__(self, readings: Iterable[float]) -> None:
        self.readings = iter(readings)

    def __call__(self, model: Any) -> float:
        oracle.logits(model)
        return next(self.readings)


class Watch(TrainerCallback):
    """Keeps what the oracle sees at the end of ``steps``, before the callback or after it."""

    def __init__(self, steps: Iterable[int], act: Callable[[int, Any], None] = lambda step, model: None) -> None:
        self.steps, self.act, self.seen = steps, act, dict[int, dict[str, Any]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, step = kwargs["model"], state.global_step
        self.act(step, model)
        if step in self.steps:
            self.seen[step] = {
                "logits": oracle.logits(model),
                "masters": oracle.masters(model),
                "forward": oracle.forward_weights(model),
                "moments": oracle.moments(model, kwargs["optimizer"]),
                "jumps": oracle.jump_adapters(model),
            }


def sharding(mode: str, bf16: bool) -> dict[str, Any]:
    """Fields of GRPOConfig."""
    if mode == "none":
        return {"use_cpu": True}
    if mode == "fsdp2":
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        saved = {"cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True, **wrap, **saved}}
    stage = {"stage": int(mode[-1]), "overlap_comm": False}
    if mode == "zero3":
        stage |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": stage, "bf16": {"enabled": bf16}, "zero_allow_untested_optimizer": True}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {**config, "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(sizes, "auto")}}


class Cells:
    """One method a run."""

    def __init__(self, out: Path, mode: str) -> None:
        self.out, self.mode = out / mode, mode
        self.base = out / "base"

    def go(
        self,
        name: str,
        callback: Any,
        *,
        steps: int = 6,
        lora: bool = True,
        watch: Iterable[int] = range(99),
        resume: int | None = None,
        reward: Any = low_digits,
        act: Callable[[int, Any], None] = lambda step, model: None,
        after: Callable[[int, Any], None] = lambda step, model: None,
        bf16: bool = False,
        **fields: Any,
    ) -> dict[str, Any]:
        """Train; ``act`` and ``after`` are called at the end of each step, before the callback and after it."""
        from datasets import Dataset
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer

        before, afterwards = Watch(watch, act), Watch(watch, after)
        settings = {
            "output_dir": str(self.out / name),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 4,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "model_init_kwargs": {"dtype": "float32"},
            "bf16": bf16,
            "gradient_checkpointing": bf16,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "ddp_timeout": 60,
            "beta": 0.0,
            "seed": 3,
        }
        set_seed(3)
        error = None
        try:
            trainer = GRPOTrainer(
                model=str(self.base),
                reward_funcs=reward,
                args=GRPOConfig(**settings | sharding(self.mode, bf16) | fields),
                train_dataset=Dataset.from_list(
                    [{"prompt": f"{a}+{b}="} for a in range(10, 20) for b in range(10, 20)]
                ),
                processing_class=AutoTokenizer.from_pretrained(self.base),
                peft_config=LoraConfig(**LORA) if lora else None,
                callbacks=[before, *([callback] if callback else []), afterwards],
            )
            trainer.remove_callback(PrinterCallback)
            checkpoint = None if resume is None else str(self.out / name / f"checkpoint-{resume}")
            trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as raised:
            traceback.print_exc()
            error = type(raised).__name__, getattr(raised, "kind", ""), getattr(raised, "message", str(raised))
        return {
            "error": error,
            "before": before.seen,
            "after": afterwards.seen,
            "journal": callback.journal.counted() if callback else [],
            "wrapped": type(trainer.model_wrapped).__name__,
        }

    def factors(self) -> Any:
        return self.go("factors", jumps(FACTORS))

    def merged(self) -> Any:
        return self.go("merged", jumps(MERGED), **SAVING)

    def merged_again(self) -> Any:
        return self.go("merged", jumps(MERGED), resume=5, **SAVING)

    def full(self) -> Any:
        """The jump is rolled back after step 6, and one step follows."""
        return self._full([0.5, 0.5, 0.1])

    def full_again(self) -> Any:
        return self._full([0.1], resume=5)

    def _full(self, readings: list[float], resume: int | None = None) -> Any:
        made = jumps(MERGED, evaluate=Probe(readings), guards={"recovery": 2})
        return self.go("full", made, steps=7, lora=False, resume=resume, **SAVING)

    def bf16(self) -> Any:
        """Full parameters, with gradient checkpointing."""
        return self.go("bf16", jumps(MERGED), lora=False, bf16=True)

    def unwritten(self) -> Any:
        """What a jump leaves that is written into the weights of the forward pass alone."""
        kept: dict[str, Any] = {}

        def keep(step: int, model: Any) -> None:
            if step == 4:
                kept.update(oracle.masters(model))

        def put_back(step: int, model: Any) -> None:
            if step == 4:
                oracle.set_masters(model, kept)

        return self.go("unwritten", jumps(FACTORS), act=keep, after=put_back)

    def scaled(self) -> Any:
        """A collapse at step 20 is undone to step 10; the run ends in the mean of the steps after it."""
        return self._scaled([0.1, 0.2, 0.3])

    def scaled_again(self) -> Any:
        return self._scaled([0.1, 0.2, 0.3], resume=13)

    def _scaled(self, readings: list[float], resume: int | None = None) -> Any:
        made = extend(SCALE, average=20, evaluate=Probe(readings))
        fields = {"learning_rate": 1e-4, "watch": (10, *range(19, 25)), **SAVING, "save_steps": 13}
        return self.go("scaled", made, steps=24, lora=False, reward=collapsing, resume=resume, **fields)

    def dies(self) -> Any:
        """Process 1, while process 0 goes on to the jump."""

        def kill(step: int, model: Any) -> None:
            if step == 4 and RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return self.go("dies", jumps(FACTORS), watch=(), act=kill)


def jumps(predictor: Any, **fields: Any) -> Any:
    return extend(predictor, **JUMP | fields)


def extend(predictor: Any, **fields: Any) -> Any:
    from next_backends.trl import PredictExtendCallback  # TRL: the shim comes first

    return PredictExtendCallback(predictor, **fields)


def main(out: Path, mode: str, cells: list[str]) -> None:
    from tests.backends.trl.distributed import shim  # before TRL is imported

    if mode.startswith("zero"):
        shim.for_deepspeed()
    runs = Cells(out, mode)
    for cell in cells:
        seen = getattr(runs, cell)()
        torch.save(seen, runs.out / f"{cell}.rank{RANK}.pt")
        if cell == "dies":
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
