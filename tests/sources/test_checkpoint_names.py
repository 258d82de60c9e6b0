"""Folders without a trainer's names: the step is the number that tells them apart, and a doubt is an error."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from next_core import open_checkpoints
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.sources.checkpoint_names import missing_steps, steps_in_names
from tests.sources.models import MODULE, adapter, model


def steps(*names: str) -> tuple[int, ...]:
    return tuple(step for step, _ in steps_in_names(names).values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("lora-step10", "lora-step20"), (10, 20)),
        (("model_0020", "model_0040"), (20, 40)),
        (("lora_s10",), (10,)),
        (("epoch1-step-300", "epoch1-step-400", "epoch2-step-500"), (300, 400, 500)),
        (("epoch1-step300", "epoch2-step600"), (300, 600)),
        (("300-steps-epoch1", "step-300-of-500"), None),
        (("qwen2.5-7b-iter_5", "qwen2.5-7b-iter_9"), (5, 9)),
        (("10-x-10", "20-x-20"), (10, 20)),
        (("lora-step10", "checkpoint20"), (10, 20)),
        (("v1-run3", "v2-run5"), None),
        (("seed0", "seed0"), None),
        (("seed1-rank8", "seed2-rank8", "seed1-rank4"), None),
        (("final",), None),
    ],
)
def test_the_step_is_the_number_that_tells_names_apart(
    names: tuple[str, ...], expected: tuple[int, ...] | None
) -> None:
    if expected is not None:
        assert steps(*names) == expected
        return
    with pytest.raises(CheckpointError, match=r"cannot tell the step of .*; rename them to checkpoint-N, or pass") as e:
        steps(*names)
    assert names[0] in str(e.value)


@pytest.mark.parametrize(
    ("observed", "missing"),
    [
        ((10, 20, 40), (30,)),
        ((10, 20, 30, 60, 70), (40, 50)),
        ((10, 20, 30), ()),
        ((10, 20, 30, 35), ()),  # the last one, at the end of training
        ((10, 20, 30, 55, 65, 75), ()),  # two grids
        ((100, 150, 160, 170), ()),  # more gap than grid
        ((1, 2, 4, 8, 16), ()),
        ((10, 40), ()),
        ((), ()),
    ],
)
def test_a_step_missing_from_a_regular_spacing_is_seen(observed: tuple[int, ...], missing: tuple[int, ...]) -> None:
    assert missing_steps(observed) == missing


def read(source: CheckpointSource, step: int, since: int) -> float:
    delta = source.delta(source.parameters[0].name, step, since)
    return float((delta.dense() if hasattr(delta, "dense") else delta).double().mean())


@pytest.mark.parametrize("name", ["lora-step{}", "model_{:04d}", "epoch1-step-{}"])
@pytest.mark.parametrize("write", [adapter, model])
def test_one_folder_of_any_names_is_read(tmp_path: Path, name: str, write: object) -> None:
    for step in (10, 20, 40):
        write(tmp_path / name.format(step), step)
    (tmp_path / "logs-2026").mkdir()
    write(tmp_path / "final", 50)
    source = open_checkpoints(tmp_path)
    assert source.name == {"adapter": "peft-adapter", "model": "full-model"}[write.__name__]
    assert source.steps == (10, 20, 40)
    assert source.naming == name.replace("{:04d}", "{}").format("N")
    assert read(source, 40, 10) == (60 if write is adapter else 30)
    first = name.format(10)
    assert any(f"{first} is taken as step 10" in note for note in source.notes)
    assert any(f"left out {tmp_path / 'final'}: no number" in note for note in source.notes)
    assert "step 30 seems to be missing" in source.notes


def test_a_name_that_is_alike_but_holds_nothing_is_an_incomplete_checkpoint(tmp_path: Path) -> None:
    adapter(tmp_path / "lora-10", 10)
    adapter(tmp_path / "lora-20", 20)
    (tmp_path / "lora-30").mkdir()
    with pytest.raises(CheckpointError, match=r"lora-30/adapter_model\.safetensors is missing"):
        open_checkpoints(tmp_path)


def test_a_trainers_names_win_over_others(tmp_path: Path) -> None:
    adapter(tmp_path / "checkpoint-5", 5)
    adapter(tmp_path / "lora-10", 10)
    source = open_checkpoints(tmp_path)
    assert (source.steps, source.naming) == ((5,), "checkpoint-N")
    assert source.notes == []


def test_a_checkpoint_is_not_taken_for_a_folder_of_checkpoints(tmp_path: Path) -> None:
    adapter(tmp_path / "run" / "jump-1", 1)
    adapter(tmp_path / "run" / "jump-2", 2)
    assert open_checkpoints(tmp_path / "run").steps == (1, 2)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).write_bytes((tmp_path / "run" / "jump-1" / name).read_bytes())
    with pytest.raises(CheckpointError, match="holds no checkpoints of a known layout"):
        open_checkpoints(tmp_path / "run")


def test_names_that_leave_a_doubt_are_named_with_the_remedy(tmp_path: Path) -> None:
    adapter(tmp_path / "v1-run3", 3)
    adapter(tmp_path / "v2-run5", 5)
    with pytest.raises(CheckpointError, match=r"step of v1-run3, v2-run5: several numbers could be the step; rename"):
        open_checkpoints(tmp_path)


def test_a_list_of_folders_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [adapter(tmp_path / "exp" / f"lora_s{step}", step) for step in (20, 10)]
    known = adapter(tmp_path / "more" / "checkpoint-30", 30)
    verl = adapter(tmp_path / "verl" / "global_step_40" / "actor" / "lora_adapter", 40)
    whole = adapter(tmp_path / "whole" / "checkpoint-50", 50).parent
    source = open_checkpoints([*folders, known, verl.parents[1], whole])
    assert source.steps == (10, 20, 30, 40, 50)
    assert read(source, 50, 10) == 80
    assert source.naming == ("checkpoint-N, exp/lora_sN, global_step_N/actor/lora_adapter")
    monkeypatch.chdir(tmp_path / "exp")
    relative = open_checkpoints(["lora_s10", Path("lora_s20")], layout="peft-adapter")
    assert read(relative, 20, 10) == 20


def test_the_step_may_be_in_a_folder_above(tmp_path: Path) -> None:
    source = open_checkpoints([adapter(tmp_path / f"s{step}" / "out" / "adapter", step) for step in (10, 20)])
    assert source.parameters[0].name == f"{MODULE}.weight"
    assert source.steps == (10, 20)


def test_a_list_that_cannot_be_a_run_is_refused(tmp_path: Path) -> None:
    one, same = adapter(tmp_path / "a" / "lora_s10", 10), adapter(tmp_path / "b" / "checkpoint-10", 10)
    with pytest.raises(CheckpointError, match=rf"step 10 is there twice: {same} and {one}"):
        open_checkpoints([one, same])
    with pytest.raises(CheckpointError, match="the list of checkpoints is empty"):
        open_checkpoints([])
    for layout in (None, "full-model"):
        with pytest.raises(CheckpointError, match=r"lora_s20 is not a folder; list the folders of the checkpoints"):
            open_checkpoints([tmp_path / "lora_s20", one], layout=layout)
    (tmp_path / "c10").mkdir()
    with pytest.raises(CheckpointError, match="none of the 1 folders holds an adapter or a model"):
        open_checkpoints([tmp_path / "c10"])


def test_a_list_does_not_lose_the_jumps_of_a_run_folder(tmp_path: Path) -> None:
    ours = [adapter(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}", step) for step in (10, 20)]
    (tmp_path / "run" / "jumps").mkdir()
    assert open_checkpoints(ours).steps == (10, 20)
    with pytest.raises(CheckpointError, match=r"run/checkpoints has jumps beside it, which a list does not count"):
        open_checkpoints([*ours, adapter(tmp_path / "other" / "lora_30", 30)])
    with pytest.raises(CheckpointError, match=r"run/checkpoints has jumps beside it"):
        open_checkpoints([ours[0].parent])


def test_a_list_from_within_the_checkpoints_does_not_lose_the_jumps_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        adapter(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}", step)
    (tmp_path / "run" / "jumps").mkdir()
    other = adapter(tmp_path / "other" / "lora_30", 30)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="has jumps beside it, which a list does not count"):
        open_checkpoints(["checkpoint-10", other])


def test_timestamps_for_steps_are_not_counted_through() -> None:
    tracemalloc.start()
    try:
        assert missing_steps((1, 2, 3, 1_700_000)) == ()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
