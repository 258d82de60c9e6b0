"""Accuracy of decoding from extrapolated logits, l_1 + a (l_2 - l_1), of two checkpoints of a LoRA run.

next-core run examples/quickstart.yaml --out runs/quickstart
python examples/logits_extrapolation.py runs/quickstart/checkpoints/step-000050 runs/quickstart/checkpoints/step-000100
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from next_core import generate_extrapolated

TASK = Path(__file__).parent / "arithmetic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path)
    parser.add_argument("--a", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--prompts", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(TASK / "base", padding_side="left")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TASK / "base"), args.earlier, "earlier")
    model.load_adapter(args.later, "later")
    model.eval()
    rows = [json.loads(line) for line in (TASK / "test.jsonl").read_text().splitlines()[: args.prompts]]
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    for a in args.a:
        for sample in (False, True):
            torch.manual_seed(0)
            made = generate_extrapolated(
                model,
                "earlier",
                "later",
                a,
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                do_sample=sample,
                max_new_tokens=4,
            )
            texts = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
            right = sum(text.strip() == row["answer"] for text, row in zip(texts, rows, strict=True))
            print(f"a = {a:g}, {'sampled' if sample else 'greedy'}: {right / len(rows):.3f}")


if __name__ == "__main__":
    main()
