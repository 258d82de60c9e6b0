"""A TRL script as anyone has one, with one line more: ``PredictExtendCallback``.

python examples/trl_callback.py --steps 100
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from next_backends.trl import PredictExtendCallback

TASK = Path(__file__).parent / "arithmetic"


def right_answer(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--observe", type=int, default=50)
    parser.add_argument("--out", default="runs/trl_callback")
    args = parser.parse_args()

    rows = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()]
    jumps = PredictExtendCallback(
        predictor={"name": "secant", "window": 10, "gate": {}},
        observe=args.observe,
        every=5,
        horizon=10,
        alpha=4,
        jump_every=10,
        settle=10,
        overwrite=True,
    )
    trainer = GRPOTrainer(
        model=str(TASK / "base"),
        reward_funcs=right_answer,
        args=GRPOConfig(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=4,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[jumps],
    )
    trainer.train()
    for jump in jumps.journal.jumps():
        print(f"step {jump['step']}: {'jumped' if jump['accepted'] else 'no jump'} ({jump['reason']})")


if __name__ == "__main__":
    main()
