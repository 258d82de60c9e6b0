"""The scripts of the examples run, and the examples differ only where they say so."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from next_core.config import load_config
from next_core.storage.yaml_files import parse_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("backend", ["openrlhf", "verl"])
def test_an_example_is_the_quickstart_with_another_backend(backend: str) -> None:
    names = (f"{backend}.yaml", "quickstart.yaml")
    ours, quickstart = (load_config(EXAMPLES / name) for name in names)
    assert (ours.backend.name, quickstart.backend.name) == (backend, "trl")
    raw = [parse_yaml((EXAMPLES / name).read_text(), name) for name in names]
    for config in raw:
        del config["backend"]
    assert raw[0] == raw[1]


@pytest.mark.trl
def test_the_trl_script_with_one_more_line_jumps(tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "trl_callback.py"), "--steps", "65", "--observe", "40"]
    done = subprocess.run([*script, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # The gate compares two windows of 25 steps, which step 40 does not have yet.
    assert "step 40: no jump (gate: no checkpoint 50 steps before step 40" in done.stdout
    assert "step 50: jumped (14 of 14 matrices)" in done.stdout


def test_extrapolated_logits_of_two_equal_adapters_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(EXAMPLES / "arithmetic" / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    script = str(EXAMPLES / "logits_extrapolation.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), str(tmp_path), "--a", "1", "5", "--prompts", "100"])
    runpy.run_path(script, run_name="__main__")
    found = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert found["a = 1, greedy"] == found["a = 5, greedy"]
    assert 0.6 < float(found["a = 1, greedy"]) < 0.8
