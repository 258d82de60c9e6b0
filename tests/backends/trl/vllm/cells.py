"""What test_vllm.py starts: short GRPO runs whose roll-outs vLLM generates, and what was seen of them.

``cells.py OUT colocate`` or ``cells.py OUT server`` writes ``OUT/RUN.json``. All runs share one engine or one server:
TRL sends it the weights before each run's first roll-outs.
"""

import functools
import json
import os
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl.generation import vllm_generation

from next_backends.trl import PredictExtendCallback
from tests.backends.trl.conftest import BASE, build
from tests.backends.trl.launch import _free_port

JUMP = {"observe": 4, "every": 2, "horizon": 2, "alpha": 8.0, "settle": 2}
"""A schedule with one jump after step 4, by eight times the motion of the last two steps."""
SECANT = {"name": "secant", "window": 2}
FACTORS, MERGED = SECANT | {"space": "factors"}, SECANT | {"space": "merged"}
SERVE = [
    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--enforce-eager"),
    *("--dtype", "float32", "--max-model-len", "64", "--gpu-memory-utilization", "0.1", "--enable-scale-out"),
    *("--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs", "--model"),
]
"""vLLM's server with what TRL asks of it."""
PROMPTS = [{"prompt": f"{a}+20=", "answer": str(a + 20)} for a in range(10, 18)]
EVALUATE = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8, "eval_rows": PROMPTS}


class Watch(TrainerCallback):
    """Compares vLLM's weights with the trainer's, and keeps what TRL logs of their log-probabilities.

    ``stale`` is how far the weights that vLLM generated a step's roll-outs with are from those the step began with,
    ``stale_at_evaluation`` the same for an evaluation, from those the step ended with.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: dict[str, dict[int, float]] = defaultdict(dict)
        self.last: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = merged(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare("stale", state.global_step)
        self.last = merged(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare("stale_at_evaluation", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in ("sampling/sampling_logp_difference/max", "eval_sampling/sampling_logp_difference/max"):
            if name in (logs or {}):
                self.seen[name.partition("/")[0]][state.global_step] = logs[name]

    def _compare(self, what: str, step: int) -> None:
        generation = self.trainer.vllm_generation
        if generation.mode == "colocate":
            engine = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
            self.seen[what][step] = distance(dict(engine.named_parameters()), self.last)


def merged(model: Any) -> dict[str, Tensor]:
    """The weights of all linear layers with all adapters in them, as vLLM names and joins them."""
    found = {}
    layers = (model.get_base_model() if hasattr(model, "peft_config") else model).model.layers
    for number, layer in enumerate(layers):
        at, mlp = layer.self_attn, layer.mlp
        joined = {
            "self_attn.qkv_proj": (at.q_proj, at.k_proj, at.v_proj),
            "self_attn.o_proj": (at.o_proj,),
            "mlp.gate_up_proj": (mlp.gate_proj, mlp.up_proj),
            "mlp.down_proj": (mlp.down_proj,),
        }
        for name, parts in joined.items():
            found[f"model.layers.{number}.{name}.weight"] = torch.cat([whole(part) for part in parts])
    return found


def whole(linear: Any) -> Tensor:
    weight = linear.weight.detach().clone()
    for adapter in getattr(linear, "active_adapters", ()):
        weight += linear.get_delta_weight(adapter).detach()
    return weight


def distance(one: dict[str, Any], other: dict[str, Tensor]) -> float:
    """The largest difference of an element."""
    return max(float((one[name].detach() - weight).abs().max()) for name, weight in other.items())


def jumps(predictor: Any, **fields: Any) -> Any:
    return PredictExtendCallback(predictor, **JUMP | fields)


def rolled_back() -> Any:
    readings = iter([0.5, 0.5, 0.1])
    return jumps(MERGED, evaluate=lambda _: next(readings), guards={"recovery": 4}, settle=4)


def probed() -> Any:
    """The probe generates with vLLM: before the jump, and after it at the same step."""
    made = jumps(MERGED, evaluate=lambda _: made.backend.trainer.evaluate()["eval_reward"], guards={"max_drop": 1.0})
    return made


def scaled() -> Any:
    """The run ends in a mean of its steps: each is measured as better than the last."""
    readings = count(1)
    return PredictExtendCallback("auto", average=16, evaluate=lambda _: next(readings) / 100)


RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "factors": (lambda: jumps(FACTORS), {}),
    "merged": (lambda: jumps(MERGED), {}),
    "full": (lambda: jumps(MERGED), {"lora": False}),
    "scaled": (scaled, {"steps": 16, "learning_rate": 1e-4, **EVALUATE}),
    "evaluated": (rolled_back, {"steps": 10, **EVALUATE}),
    "probed": (probed, EVALUATE),
}


def main(out: Path, mode: str) -> None:
    fields = {"use_vllm": True, "vllm_mode": mode, "vllm_max_model_length": 64, "logging_steps": 1, "steps": 6}
    fields["vllm_gpu_memory_utilization"] = 0.1
    if mode == "server":
        port = _free_port()
        subprocess.Popen([*SERVE, str(BASE), "--port", str(port)])  # test_vllm.py ends it
        fields |= {"vllm_server_base_url": f"http://127.0.0.1:{port}", "vllm_server_timeout": 600.0}
        fields["vllm_group_port"] = _free_port()
    # TRL leaves vLLM at bf16, whose rounding alone makes log-probabilities differ by .005.
    engine = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    vllm_generation.LLM = functools.cache(engine)
    vllm_generation.VLLMClient = functools.cache(vllm_generation.VLLMClient)
    for name, (make, more) in RUNS.items():
        watch, callback = Watch(), make()
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        watch.trainer = build(tokenizer, out / name, [callback, watch], **fields | more)
        watch.trainer.train()
        seen = {**watch.seen, "mode": mode, "journal": callback.journal.counted()}
        (out / f"{name}.json").write_text(json.dumps(seen, default=str), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # the threads of vLLM and of TRL's client do not end by themselves
