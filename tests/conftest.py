"""Small models and runs made on the spot by real PEFT, and the command line as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# What pytest starts inherits this: the workers of ``pytest -n``, of which each computes in one thread, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

STEPS = (10, 20, 30, 40, 50, 60)
SLOW = ("ray", "trl")  # Markers of tests that take seconds to minutes


def noise(seed: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads what another one kept, nor the user's cache, nor how wide a terminal was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("COLUMNS", raising=False)  # readline, which pytest imports, sets it for what pytest starts


@pytest.fixture(scope="session")
def dead() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@dataclass
class LoraRun:
    """Checkpoints of a LoRA run, and by step what PEFT itself says each matrix had moved by."""

    path: Path
    base: Path
    deltas: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def folder(self, step: int) -> Path:
        return next(path for path in self.path.iterdir() if int(path.name.split("-")[1]) == step)


MakeRun = Callable[..., LoraRun]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with random weights, and files where its tokenizer would be."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("models") / "base"
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, initializer_range=0.3)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="session")
def make_lora_run(base: Path) -> MakeRun:
    """``make_lora_run(folder, steps, frozen, **LoraConfig fields)``: as TRL lays a run out, ``checkpoint-N``.

    The factors move along curves, with noise; a module whose name ends as one of ``frozen`` never moves.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(
        path: Path, steps: Sequence[int] = STEPS, frozen: Sequence[str] = (), name: str = "checkpoint-{}", **lora: Any
    ) -> LoraRun:
        torch.manual_seed(1)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        layers = {k: m for k, m in model.base_model.model.named_modules() if "default" in getattr(m, "lora_A", {})}
        start = {key: layer.lora_A["default"].weight.detach().clone() for key, layer in layers.items()}
        run = LoraRun(path, base)
        for step in steps:
            run.deltas[step] = {}
            for key, layer in layers.items():
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                with torch.no_grad():
                    if step and not key.endswith(tuple(frozen)):
                        A.copy_(start[key] + 0.002 * step**1.1 * noise(key + "A", *A.shape))
                        B.copy_(0.002 * step**0.9 * noise(key + "B", *B.shape))
                        B.add_(0.002 * noise(f"{key}{step}", *B.shape))
                    run.deltas[step][f"{key}.weight"] = layer.get_delta_weight("default").double()
            folder = path / name.format(step)
            model.save_pretrained(folder)
            logged = [{"step": s, "epoch": 0.1, "reward": 0.2 + s / 200, "note": "text"} for s in range(5, step + 1, 5)]
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logged}))
        return run

    return make


@pytest.fixture(scope="session")
def lora_run(make_lora_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    """A run nobody writes to, step 0 included; the k_proj of layer 1 never moves."""
    return make_lora_run(tmp_path_factory.mktemp("run") / "checkpoints", (0, *STEPS), frozen=["1.self_attn.k_proj"])


@pytest.fixture
def own_lora_run(lora_run: LoraRun, tmp_path: Path) -> LoraRun:
    """A copy of it that a test may damage."""
    import shutil

    return LoraRun(
        Path(shutil.copytree(lora_run.path, tmp_path / "run" / "checkpoints")), lora_run.base, lora_run.deltas
    )


@pytest.fixture
def logits() -> Callable[[Any], Tensor]:
    """What a causal language model says to fixed tokens, in fp64."""

    def compute(model: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = model.double().eval()(input_ids=torch.arange(24).reshape(2, 12)).logits
        return out

    return compute


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``next-core ARGUMENTS`` through its entry point, in this process."""
    from next_core.cli import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["next-core", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers begin with the files that take long: whoever came to one last would keep the others waiting."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if any(item.get_closest_marker(name) for name in SLOW)}
        items.sort(key=lambda item: item.path not in slow)


def pytest_configure() -> None:
    """A shell that starts the tests in the background lets them ignore SIGINT, and so all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
