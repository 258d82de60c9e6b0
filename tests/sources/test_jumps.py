"""Jumps of a run folder are added to the checkpoints before them, so that deltas show what RL did."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.history.history import History
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.jumps import Shift, TensorCache
from next_core.storage.json_lines import json_line
from next_core.types import LoraFactors
from tests.conftest import STEPS, LoraRun, noise
from tests.errors import raises_kind
from tests.sources.models import write_jump

NAME = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"


def jump(run: LoraRun, number: int, step: int, shift: dict[str, Tensor] | None = None) -> Path:
    return write_jump(run.path.parent, step, shift, number)


def moved(seed: str, name: str = NAME) -> dict[str, Tensor]:
    return {f"{name}.lora_A": noise(seed + "A", 4, 16), f"{name}.lora_B": noise(seed + "B", 16, 4)}


def opened(run: LoraRun) -> PeftAdapterSource:
    return open_checkpoints(run.path)


def dense(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.B.double() @ factors.A.double()


def assert_moved(found: LoraFactors, stored: LoraFactors, *shifts: dict[str, Tensor]) -> None:
    A = sum((shift[f"{NAME}.lora_A"] for shift in shifts), stored.A)
    B = sum((shift[f"{NAME}.lora_B"] for shift in shifts), stored.B)
    torch.testing.assert_close(found.A, A)
    torch.testing.assert_close(found.B, B)


def test_a_jump_moves_the_checkpoints_up_to_its_step_and_no_later_one(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    plain, shift = opened(lora_run), moved("s")
    jump(own_lora_run, 1, 30, shift)
    source = opened(own_lora_run)
    for step in (0, *STEPS):
        shifts = [shift] if step <= 30 else []
        assert_moved(source.factors(NAME, step), plain.factors(NAME, step), *shifts)
        assert torch.equal(source.factors(OTHER, step).B, plain.factors(OTHER, step).B)


def test_a_run_as_of_a_step_counts_only_the_jumps_made_before_it(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    plain, first, second = opened(lora_run), moved("s"), moved("t")
    jump(own_lora_run, 1, 30, first)
    jump(own_lora_run, 2, 50, second)
    source = opened(own_lora_run)
    assert source.as_of(60) is source
    for _ in range(2):  # the cache of one is not the other's
        assert_moved(source.factors(NAME, 20), plain.factors(NAME, 20), first, second)
        assert_moved(source.as_of(50).factors(NAME, 20), plain.factors(NAME, 20), first)
        assert torch.equal(source.as_of(30).factors(NAME, 20).B, plain.factors(NAME, 20).B)
    sent = pickle.loads(pickle.dumps(source.as_of(50)))
    assert torch.equal(sent.factors(NAME, 20).B, source.as_of(50).factors(NAME, 20).B)
    assert source.as_of(50).fingerprint(20) != source.fingerprint(20)


def test_a_delta_across_a_jump_is_what_rl_did(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    source, plain = opened(own_lora_run), opened(lora_run)
    at = source.factors(NAME, 30)
    before, after = dense(at), dense(source.factors(NAME, 40))
    torch.testing.assert_close(source.delta(NAME, 40, 30).dense(), after - before, atol=1e-6, rtol=1e-5)
    # The start is moved as well: a global delta is the motion since, and not the jump.
    start = dense(source.factors(NAME, 0))
    torch.testing.assert_close(source.delta(NAME, 40).dense(), after - start, atol=1e-6, rtol=1e-5)
    # What the weights really are is another question.
    torch.testing.assert_close(source.position(NAME, 40).dense(), plain.delta(NAME, 40).dense(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(source.position(NAME, 30).dense(), before, atol=1e-6, rtol=1e-5)


def test_a_history_has_the_same_deltas_as_its_source(own_lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    source = opened(own_lora_run)
    assert source.start(NAME) is not None  # the jump moved the adapter as it was initialised, where B was 0
    assert source.start(OTHER) is None
    history = History(source)
    for name in (NAME, OTHER):
        norms = [source.delta(name, step).dense().norm() for step in STEPS]
        torch.testing.assert_close(history.components("global")[name].energy.sqrt(), torch.stack(norms))
        torch.testing.assert_close(history.grams()[name].diagonal().sqrt(), torch.stack(norms))


def test_a_rolled_back_jump_is_forgotten_when_the_next_takes_its_name(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    source, plain = opened(own_lora_run), opened(lora_run).factors(NAME, 20)
    for seed, step in zip("stuvw", (30, 30, 40, 30, 40), strict=True):  # each takes the number of the one before
        folder = jump(own_lora_run, 1, step, moved(seed))
        source.refresh()
        assert_moved(source.factors(NAME, 20), plain, moved(seed))
        shutil.rmtree(folder)
        source.refresh()
        assert_moved(source.factors(NAME, 20), plain)


def test_after_a_jump_was_undone_the_history_starts_at_that_step(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    folder = jump(own_lora_run, 1, 30, moved("s"))
    (folder / "undone.json").write_text('{"step": 40}')
    source = opened(own_lora_run)
    assert source.steps == (40, 50, 60)
    assert_moved(source.factors(NAME, 50), opened(lora_run).factors(NAME, 50))


def test_jumps_are_not_added_to_a_trainers_own_folder(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    trainer = LoraRun(own_lora_run.path.rename(own_lora_run.path.with_name("trainer")), own_lora_run.base)
    assert_moved(opened(trainer).factors(NAME, 20), opened(lora_run).factors(NAME, 20))


def test_shifts_that_share_a_cache_are_not_confused(tmp_path: Path) -> None:
    cache, begin = TensorCache(), torch.zeros(2)
    for value in range(5):  # each may stand in memory where the one before did
        save_file({"x": torch.full((2,), float(value))}, tmp_path / "shift.safetensors")
        assert Shift(tmp_path / "shift.safetensors", cache).added(begin, "x").tolist() == [value, value]


def test_a_jump_in_an_adapter_of_its_own_shifts_nothing(own_lora_run: LoraRun, lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30)
    assert torch.equal(opened(own_lora_run).factors(NAME, 20).B, opened(lora_run).factors(NAME, 20).B)


STEPS_OF_NO_JUMP = ("null", '"soon"', "-1", "true", "1e3", 10**16)
RECORDS = ["{", "[]", "{}", *(f'{{"step": {step}}}' for step in STEPS_OF_NO_JUMP)]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", ["jump.json", "undone.json"])
def test_a_record_without_a_valid_step_is_named(own_lora_run: LoraRun, name: str, record: str) -> None:
    path = jump(own_lora_run, 1, 30, moved("s")) / name
    path.write_text(record)
    with raises_kind("checkpoint-damaged", path):
        opened(own_lora_run)


def test_a_shift_that_is_damaged_or_of_another_shape_is_named(own_lora_run: LoraRun) -> None:
    folder = jump(own_lora_run, 1, 30, {f"{NAME}.lora_A": torch.zeros(3, 16)})
    with raises_kind("checkpoint-other-model", folder / "shift.safetensors", f"'{NAME}.lora_A'"):
        opened(own_lora_run).factors(NAME, 20)
    (folder / "shift.safetensors").write_bytes(b"short")
    with raises_kind("checkpoint-damaged", folder / "shift.safetensors"):
        opened(own_lora_run)


@pytest.mark.parametrize(
    "way", ["..", ".", "a link", "a link of the same name", "itself a link", "the checkpoint's parent"]
)
def test_a_run_is_read_the_same_by_any_name(
    own_lora_run: LoraRun, lora_run: LoraRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    (own_lora_run.folder(60) / "trainer_state.json").unlink()
    (own_lora_run.path.parent / "metrics.jsonl").write_bytes(json_line({"step": 10, "reward": 0.25}))
    path = Path(way)
    if way in (".", ".."):
        monkeypatch.chdir(own_lora_run.path if way == "." else own_lora_run.folder(10))
    elif way == "itself a link":
        path = own_lora_run.path
        path.symlink_to(path.rename(path.with_name("elsewhere")), target_is_directory=True)
    elif way == "the checkpoint's parent":
        path = own_lora_run.folder(10) / ".."
    else:
        path = tmp_path / "links" / ("checkpoints" if "same" in way else "mine")
        path.parent.mkdir()
        path.symlink_to(own_lora_run.path, target_is_directory=True)
    source = open_checkpoints(path)
    monkeypatch.chdir(tmp_path)
    assert_moved(source.factors(NAME, 20), opened(lora_run).factors(NAME, 20), moved("s"))
    if "link" not in way:
        assert source.metrics(10) == {"reward": 0.25}
