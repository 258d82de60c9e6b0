"""What test_sharded.py starts in two processes: short GRPO runs under one MODE, and what the oracle saw of them.

``cells.py OUT MODE CELL...`` writes ``OUT/MODE/CELL.rank0.pt`` and ``OUT/MODE/CELL.rank1.pt``.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from next_core.live_weights import optimizer_steps
from tests.backends.trl.conftest import BASE, build
from tests.backends.trl.distributed import oracle

RANK = int(os.environ.get("RANK", "0"))
JUMP = {"observe": 4, "every": 2, "horizon": 2, "alpha": 4.0, "settle": 2}
"""A schedule with one jump after step 4, by four times the motion of the last two steps."""
FACTORS = {"name": "secant", "window": 2, "space": "factors"}
MERGED = {"name": "secant", "window": 2, "space": "merged"}
LORA = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SAVING = {"save_strategy": "steps", "save_steps": 5}
MISSED = range(18, 20)  # Steps whose roll-outs earn nothing in the run whose reward collapses


def make_base(folder: Path) -> None:
    """Write a model of 20,000 random parameters with the arithmetic task's tokenizer.

    Some adapters have an odd number of elements: their parts in two processes are padded.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 47, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(BASE, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)


def low_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "01234" for c in text) / 4 for text in completions]


def collapsing(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    return [reward * (trainer_state.global_step not in MISSED) for reward in low_digits(completions)]


class Probe:
    """Returns accuracies from a list, after a forward pass as a user's probe makes it."""

    def __init__(self, *readings: float) -> None:
        self.readings = iter(readings)

    def __call__(self, model: Any) -> float:
        model.eval()
        with torch.no_grad():
            model(input_ids=oracle.IDS)
        return next(self.readings)


class Watch(TrainerCallback):
    """At the end of a step calls ``act(step, model)``, and at those of ``steps`` keeps what the oracle sees."""

    def __init__(self, act: Callable[[int, Any], None] | None = None, steps: Iterable[int] = range(99)) -> None:
        self.act, self.steps, self.seen = act, steps, dict[int, dict[str, Any]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, step = kwargs["model"], state.global_step
        if self.act is not None:
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
        return {}
    if mode == "fsdp2":
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        saved = {"cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
        config = {"version": 2, "reshard_after_forward": True, **wrap, **saved}
        return {"use_cpu": False, "fsdp": True, "fsdp_config": config}
    stage = {"stage": int(mode[-1]), "overlap_comm": False}
    if mode == "zero3":  # some tensors are larger than 150 and divided, the others stay whole
        stage |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 150}
    config = {"zero_optimization": stage, "bf16": {"enabled": bf16}, "zero_allow_untested_optimizer": True}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config |= {"zero_force_ds_cpu_optimizer": False, **dict.fromkeys(sizes, "auto")}
    return {"use_cpu": False, "deepspeed": config}


class Cells:
    """One method a run."""

    def __init__(self, out: Path, mode: str) -> None:
        self.out, self.mode, self.base = out / mode, mode, out / "base"

    def go(
        self,
        name: str,
        callback: Any,
        *,
        before: Watch | None = None,
        after: Watch | None = None,
        steps: int = 6,
        lora: bool = True,
        resume: int | None = None,
        reward: Any = low_digits,
        bf16: bool = False,
        **fields: Any,
    ) -> dict[str, Any]:
        """Train, and say what was seen before the callback acted at the end of a step, and after it."""
        before, after, out = before or Watch(), after or Watch(), self.out / name
        settings = sharding(self.mode, bf16) | {"bf16": bf16, "gradient_checkpointing": bf16, "ddp_timeout": 60}
        settings |= {"per_device_train_batch_size": 4, "logging_steps": 1, "model_init_kwargs": {"dtype": "float32"}}
        run = {"steps": steps, "lora": LORA if lora else False, "model": str(self.base), "reward": reward}
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        error = trainer = None
        try:
            trainer = build(tokenizer, out, [before, callback, after], **run, **settings | fields)
            checkpoint = None if resume is None else str(out / f"checkpoint-{resume}")
            trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as raised:
            traceback.print_exc()
            error = type(raised).__name__, getattr(raised, "kind", ""), getattr(raised, "message", str(raised))
        return {
            "error": error,
            "before": before.seen,
            "after": after.seen,
            "journal": callback.journal.counted(),
            "wrapped": type(getattr(trainer, "model_wrapped", None)).__name__,
        }

    def factors(self) -> Any:
        return self.go("factors", jumps(FACTORS))

    def merged(self) -> Any:
        return self._judged("merged")

    def merged_again(self) -> Any:
        return self._judged("merged", 0.1, resume=5)

    def full(self) -> Any:
        return self._judged("full", lora=False)

    def full_again(self) -> Any:
        return self._judged("full", 0.1, lora=False, resume=5)

    def _judged(self, name: str, *readings: float, **fields: Any) -> Any:
        """The jump is rolled back after step 6, and one step follows."""
        made = jumps(MERGED, evaluate=Probe(*(readings or (0.5, 0.5, 0.1))), guards={"recovery": 2})
        return self.go(name, made, steps=7, **SAVING, **fields)

    def bf16(self) -> Any:
        """Full parameters, with gradient checkpointing."""
        return self.go("bf16", jumps(MERGED), lora=False, bf16=True)

    def scaled(self, resume: int | None = None) -> Any:
        """A collapse at step 20 is undone to step 10; the run ends in the mean of the steps after it."""
        # Each process samples its own shards: only with every coordinate in the sample do multiples not depend on them.
        optimizer_steps.sample_indices = lambda sizes, count: [torch.arange(size) for size in sizes]
        made = extend({"name": "step-scale", "block": 2}, average=20, evaluate=Probe(0.1, 0.2, 0.3))
        before, after = (Watch(steps=(10, *range(19, 25))) for _ in range(2))
        fields = {"learning_rate": 1e-4, **SAVING, "save_steps": 13}
        return self.go(
            "scaled", made, before=before, after=after, steps=24, lora=False, reward=collapsing, resume=resume, **fields
        )

    def scaled_again(self) -> Any:
        return self.scaled(resume=13)

    def reward(self) -> Any:
        """The probe is the trainer's own reward of prompts that it holds back: the processes generate together."""
        return self.go("reward", jumps(FACTORS, evaluate="reward", guards={"max_drop": 1.0}))

    def raises(self) -> Any:
        """In process 1 the probe after the jump fails before its forward pass, which process 0 begins."""
        probe, count = Probe(0.5, 0.5, 0.5), iter(range(3))

        def failing(model: Any) -> float:
            if next(count) == 1 and RANK == 1:
                raise ValueError("no such file")
            return probe(model)

        return self.go("raises", jumps(FACTORS, evaluate=failing))

    def dies(self) -> Any:
        """Process 1, while process 0 goes on to the jump."""

        def kill(step: int, model: Any) -> None:
            if step == 4 and RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return self.go("dies", jumps(FACTORS), before=Watch(kill, steps=()), after=Watch(steps=()))

    def storm(self) -> Any:
        """Many jumps and saves; STORM ("rank seconds") kills a process so long after its first step."""
        from next_backends.trl import last_checkpoint  # TRL: the shim comes first

        kill = Watch(steps=())

        def later(step: int, model: Any) -> None:
            rank, seconds = os.environ.pop("STORM", "- 0").split()
            if rank == str(RANK):
                threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()

        kill.act = later
        made = extend(FACTORS, **JUMP | {"jump_every": 4, "settle": 2})
        newest, step, _ = last_checkpoint(self.out / "storm")
        fields = {"save_strategy": "steps", "save_steps": 2}
        return self.go(
            "storm", made, before=kill, after=Watch(steps=(24,)), steps=24, resume=step if newest else None, **fields
        )


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
        torch.save(getattr(runs, cell)(), runs.out / f"{cell}.rank{RANK}.pt")
    os._exit(0)  # where a process has died, the other's exit handlers wait for it


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
