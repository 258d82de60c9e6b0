"""The jump of ``jump-1.5B`` by mergekit's ``task_arithmetic``; run by the Python of an environment that has mergekit.

    python benchmarks/speed/task_arithmetic.py BASE.safetensors NEWEST.safetensors BETA OUT

Prints seconds and what was written as JSON. ``jump-1.5B --mergekit PYTHON`` starts it and watches its memory.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

MODEL = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 28}
MODEL |= {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def main(base: str, newest: str, beta: str, out: str) -> None:
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    torch.set_num_threads(1)
    models = [_model(Path(out), number, Path(weights)) for number, weights in enumerate((base, newest))]
    merge = {"merge_method": "task_arithmetic", "dtype": "float32", "out_dtype": "bfloat16", "base_model": models[0]}
    config = MergeConfiguration.model_validate(
        merge | {"models": [{"model": models[1], "parameters": {"weight": float(beta)}}]}
    )
    cpu, wall = time.process_time(), time.perf_counter()
    run_merge(config, f"{out}/merged", MergeOptions(copy_tokenizer=False, write_model_card=False))
    seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    files = sorted(str(path) for path in Path(out).glob("merged/*.safetensors"))
    print(json.dumps(seconds | {"version": version("mergekit"), "files": files}))


def _model(out: Path, number: int, weights: Path) -> str:
    """A folder with the weights and the config that mergekit needs."""
    folder = out / str(number)
    folder.mkdir(parents=True)
    (folder / weights.name).symlink_to(weights)
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
