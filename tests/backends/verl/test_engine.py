"""verl's FSDP2 engine, its worker and its checkpoint manager in two gloo processes, through the cycle.

Ray and rollouts are missing: ``cpu/engine_trainer.py`` trains on right answers. The oracle is the processes' memory,
gathered by torch after each step (``before``) and after the pause that may follow it (``after``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from next_backends.external.trainer import Trainer
from next_core.cycle.run import run
from next_core.cycle.run_result import RunResult
from tests.backends.external.real import TASK, arithmetic_run, killing, replaced, stored
from tests.backends.verl.conftest import CPU
from tests.errors import raises_kind

pytestmark = pytest.mark.verl
SCRIPT = """#!/bin/sh
case "$1" in
  */launch.py) shift; exec {python} -m torch.distributed.run --standalone --nproc-per-node=2 {trainer} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""
RATE = 1e-3
KINDS = ("lora", "full")


@dataclass
class Made:
    """A finished run."""

    out: Path
    lora: bool
    result: RunResult

    def truth(self, step: int, when: str, run: str = "truth") -> dict[str, Tensor]:
        """What was in memory; ``run`` is "first" for what ran before it was killed."""
        return load_file(self.out.parent / run / f"{step}-{when}.safetensors")

    def weights(self, step: int, when: str) -> dict[str, Tensor]:
        """The trained ones."""
        found = self.truth(step, when)
        return {n: v for n, v in found.items() if n in self.names(found)}

    def names(self, found: dict[str, Tensor]) -> list[str]:
        names = [name for name in found if name != "logits" and not name.startswith("adam.")]
        return [name for name in names if "lora_" in name] if self.lora else names

    def adam(self, step: int, when: str) -> dict[str, Tensor]:
        return {name: value for name, value in self.truth(step, when).items() if name.startswith("adam.")}

    def stored(self, step: int) -> dict[str, Tensor]:
        """A checkpoint, by the names that the model in training has."""
        found = stored(self.out, step)
        return {name.replace(".weight", ".default.weight") if self.lora else name: v for name, v in found.items()}

    def landed(self) -> dict[str, Tensor]:
        """The checkpoint of step 3 plus the jump's shift."""
        wanted = self.stored(3)
        for key, move in load_file(self.out / "jumps" / "0001" / "shift.safetensors").items():
            module, _, side = key.rpartition(".weight.")
            name = f"base_model.model.{module}.{side}.default.weight" if self.lora else key
            wanted[name] = wanted[name] + move
        return wanted


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def make(
    verl_backend: Callable[..., dict[str, Any]], verl_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Made]:
    """``make(kind, **blocks)`` runs six steps with a jump after the third; ``killed_after`` a step it is resumed."""

    def started(kind: str, killed_after: int | None = None, **changes: Any) -> Made:
        folder = tmp_path_factory.mktemp(kind)
        python = folder / "bin" / "python"
        python.parent.mkdir()
        python.write_text(SCRIPT.format(python=verl_python, trainer=CPU / "engine_trainer.py"))
        python.chmod(0o755)
        training = {"learning_rate": RATE, "max_new_tokens": 4, **({} if kind == "lora" else {"lora": None})}
        backend = verl_backend(python=str(python), env={"TRUTH": str(folder / "truth")})
        settings = arithmetic_run(backend, training, **changes)
        if killed_after is not None:
            with killing(killed_after), raises_kind("backend-process-lost"):
                run(settings, folder / "run")
            (folder / "truth").rename(folder / "first")
        return Made(folder / "run", kind == "lora", run(settings, folder / "run"))

    return started


@pytest.fixture(scope="module", params=KINDS)
def jumped(request: pytest.FixtureRequest, make: Callable[..., Made]) -> Made:
    return make(request.param)


def test_checkpoints_are_the_weights_in_memory(jumped: Made) -> None:
    for step in (1, 2, 3):
        assert same(jumped.stored(step), jumped.weights(step, "before")), step
    assert furthest(jumped.stored(3), jumped.stored(2)) > 0


def test_a_jump_moves_the_weights_and_keeps_adams_state(jumped: Made) -> None:
    (jump,) = jumped.result.jumps
    assert jump["accepted"], jump["reason"]
    after = jumped.weights(3, "after")
    assert same(jumped.landed(), after)
    assert furthest(after, jumped.weights(3, "before")) > RATE
    assert same(jumped.adam(3, "before"), jumped.adam(3, "after"))
    assert same(jumped.weights(4, "before"), jumped.weights(4, "after"))


def test_logits_after_a_jump_are_those_of_the_predicted_weights(jumped: Made, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(TASK / "base", dtype=torch.float32)
    if jumped.lora:
        model = PeftModel.from_pretrained(model, jumped.out / "checkpoints" / "step-000003")
    before = model(input_ids=torch.arange(3, 11)[None]).logits
    model.load_state_dict(jumped.landed() if not jumped.lora else model.state_dict() | jumped.landed())
    after = model(input_ids=torch.arange(3, 11)[None]).logits
    for when, logits in (("before", before if jumped.lora else None), ("after", after)):
        if logits is not None:
            torch.testing.assert_close(jumped.truth(3, when)["logits"], logits.detach(), rtol=0, atol=1e-5)
    assert float((jumped.truth(3, "after")["logits"] - jumped.truth(3, "before")["logits"]).abs().max()) > 1e-3


def test_the_next_step_starts_from_the_jumped_weights(jumped: Made) -> None:
    # Adam moves each weight by about the learning rate.
    assert 0 < furthest(jumped.weights(4, "before"), jumped.landed()) < 5 * RATE


def test_the_accuracy_is_the_probability_of_the_right_answers(jumped: Made) -> None:
    before, after = jumped.result.accuracy["before_jump"], jumped.result.accuracy["after_jump"]
    assert before is not None
    assert after is not None
    assert 0 < before < 1
    assert after != before


def test_a_jump_is_undone_at_once_or_after_steps_with_its_moments(make: Callable[..., Made]) -> None:
    """The guards find the first jump, after step 3, harmful at once, and the second, after step 5, at step 7."""
    asked: list[tuple[int, str]] = []

    def ask(real: Any, trainer: Trainer, what: str, **request: Any) -> Any:
        asked.append((trainer.step, what))
        answer = real(trainer, what, **request)
        harmed = trainer.step == 7 or (trainer.step == 3 and (3, "load") in asked)
        return -1.0 if what == "likelihood" and harmed else answer

    with replaced("ask", ask):
        made = make(
            "lora",
            steps=8,
            schedule={"observe": 3, "every": 1, "horizon": 2, "alpha": 2, "jump_every": 2, "settle": 2},
            guards={"max_drop": 0.5, "recovery": 2, "tolerance": 0.0},
        )
    assert [jump["accepted"] for jump in made.result.jumps[:2]] == [False, False], made.result.jumps
    assert [(step, what) for step, what in asked if what in ("load", "restore")][:4] == [
        (3, "load"),
        (3, "load"),
        (5, "load"),
        (7, "restore"),
    ]
    for before, after in (("3-before", "3-after"), ("5-before", "7-after")):
        one, other = ((int(step), when) for step, when in (name.split("-") for name in (before, after)))
        assert same(made.weights(*one), made.weights(*other)), after
        assert same(made.adam(*one), made.adam(*other)), after
    assert furthest(made.weights(5, "before"), made.weights(5, "after")) > 0


def test_a_killed_run_is_resumed_from_verls_own_checkpoint(make: Callable[..., Made]) -> None:
    made = make("full", killed_after=5)
    assert made.result.resumed_from == 4
    assert len(made.result.jumps) == 1
    for step, when, again in ((4, "after", "before"), (5, "before", "before")):
        first, second = made.truth(step, when, "first"), made.truth(step, again)
        assert same(first, second), step  # weights, moments and logits, bit for bit


def test_auto_scales_the_steps_and_is_resumed(make: Callable[..., Made]) -> None:
    made = make("lora", 7, steps=10, save_every=5, predictor="auto", schedule={}, guards={})
    assert made.result.resumed_from == 5
    first, second = made.result.scaling
    assert (first["step"], first["multiple"], second["step"]) == (5, 1.0, 10)
    assert second["rate"] == pytest.approx(RATE * second["multiple"])
    assert same(made.truth(5, "after", "first"), made.truth(5, "before"))
    assert not (made.out / "checkpoints").exists()
