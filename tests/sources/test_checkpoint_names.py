"""Folders without a trainer's names: the step is the number that differs, and ambiguity is an error."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from next_core import open_checkpoints
from next_core.interfaces import CheckpointSource
from next_core.sources.checkpoint_names import missing_steps, steps_in_names
from tests.errors import raises_kind
from tests.sources.models import MODULE, adapter, model


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
        (("step9k", "step10k"), None),
        (("ckpt-1e3", "ckpt-2e3"), None),
    ],
)
def test_the_step_is_the_number_that_differs(names: tuple[str, ...], expected: tuple[int, ...] | None) -> None:
    if expected is not None:
        assert tuple(step for step, _ in steps_in_names(names).values()) == expected
        return
    with raises_kind("checkpoint-ambiguous-step", names[0]):
        steps_in_names(names)


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
def test_a_step_missing_from_a_regular_spacing_is_noticed(observed: tuple[int, ...], missing: tuple[int, ...]) -> None:
    assert missing_steps(observed) == missing


def test_the_steps_between_timestamps_are_not_listed() -> None:
    tracemalloc.start()
    try:
        assert missing_steps((1, 2, 3, 1_700_000)) == ()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def read(source: CheckpointSource, step: int, since: int) -> float:
    delta = source.delta(source.parameters[0].name, step, since)
    return float((delta.dense() if hasattr(delta, "dense") else delta).double().mean())


@pytest.mark.parametrize("name", ["lora-step{}", "model_{:04d}", "epoch1-step-{}"])
@pytest.mark.parametrize(("write", "layout", "motion"), [(adapter, "peft-adapter", 60), (model, "full-model", 30)])
def test_names_are_read(
    tmp_path: Path, name: str, write: Callable[[Path, int], Path], layout: str, motion: int
) -> None:
    for step in (10, 20, 40):
        write(tmp_path / name.format(step), step)
    (tmp_path / "logs-2026").mkdir()
    write(tmp_path / "final", 50)
    source = open_checkpoints(tmp_path)
    assert (source.name, source.steps) == (layout, (10, 20, 40))
    assert source.naming == name.replace("{:04d}", "{}").format("N")
    assert read(source, 40, 10) == motion
    notes = "\n".join(source.notes)
    assert all(text in notes for text in (f"{name.format(10)} is taken as step 10", str(tmp_path / "final"), "step 30"))


def test_a_folder_that_is_only_named_like_a_checkpoint_is_an_incomplete_one(tmp_path: Path) -> None:
    adapter(tmp_path / "lora-10", 10)
    (tmp_path / "lora-20").mkdir()
    with raises_kind("checkpoint-incomplete", tmp_path / "lora-20" / "adapter_model.safetensors"):
        open_checkpoints(tmp_path)


def test_a_trainers_names_take_precedence(tmp_path: Path) -> None:
    adapter(tmp_path / "checkpoint-5", 5)
    adapter(tmp_path / "lora-10", 10)
    source = open_checkpoints(tmp_path)
    assert (source.steps, source.naming, source.notes) == ((5,), "checkpoint-N", [])


@pytest.mark.parametrize("names", [("sft-10", "rl-20"), ("checkpoint-10", "step-20"), ("checkpoint-10", "step-10")])
def test_names_of_two_runs_in_one_folder_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    folders = [adapter(tmp_path / name, step) for name, step in zip(names, (10, 20), strict=True)]
    with raises_kind("checkpoint-ambiguous-step", *(name.rstrip("012") + "N" for name in names)):
        open_checkpoints(tmp_path)
    if names[1].endswith("20"):
        assert open_checkpoints(folders).steps == (10, 20)


def test_a_checkpoint_is_not_taken_for_a_folder_of_checkpoints(tmp_path: Path) -> None:
    adapter(tmp_path / "run" / "jump-1", 1)
    adapter(tmp_path / "run" / "jump-2", 2)
    assert open_checkpoints(tmp_path / "run").steps == (1, 2)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).write_bytes((tmp_path / "run" / "jump-1" / name).read_bytes())
    with raises_kind("checkpoint-unknown-layout", tmp_path / "run"):
        open_checkpoints(tmp_path / "run")


def test_a_list_of_folders_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [adapter(tmp_path / "exp" / f"lora_s{step}", step) for step in (20, 10)]
    known = adapter(tmp_path / "more" / "checkpoint-30", 30)
    verl = adapter(tmp_path / "verl" / "global_step_40" / "actor" / "lora_adapter", 40)
    whole = adapter(tmp_path / "whole" / "checkpoint-50", 50).parent
    source = open_checkpoints([*folders, known, verl.parents[1], whole])
    assert source.steps == (10, 20, 30, 40, 50)
    assert read(source, 50, 10) == 80
    assert source.naming == "checkpoint-N, exp/lora_sN, global_step_N/actor/lora_adapter"
    monkeypatch.chdir(tmp_path / "exp")
    relative = open_checkpoints(["lora_s10", Path("lora_s20")], layout="peft-adapter")
    assert read(relative, 20, 10) == 20


def test_the_step_may_be_in_a_folder_above(tmp_path: Path) -> None:
    source = open_checkpoints([adapter(tmp_path / f"s{step}" / "out" / "adapter", step) for step in (10, 20)])
    assert source.parameters[0].name == f"{MODULE}.weight"
    assert source.steps == (10, 20)


def test_a_list_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    one, same = adapter(tmp_path / "a" / "lora_s10", 10), adapter(tmp_path / "b" / "checkpoint-10", 10)
    with raises_kind("checkpoint-ambiguous-step", "step 10", one, same):
        open_checkpoints([one, same])
    with raises_kind("checkpoint-not-found"):
        open_checkpoints([])
    for layout in (None, "full-model"):
        with raises_kind("checkpoint-not-found", "lora_s20"):
            open_checkpoints([tmp_path / "lora_s20", one], layout=layout)
    (tmp_path / "c10").mkdir()
    with raises_kind("checkpoint-unknown-layout"):
        open_checkpoints([tmp_path / "c10"])


def test_a_list_must_not_lose_the_jumps_of_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [adapter(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}", step) for step in (10, 20)]
    (tmp_path / "run" / "jumps").mkdir()
    other = adapter(tmp_path / "other" / "lora_30", 30)
    assert open_checkpoints(ours).steps == (10, 20)
    monkeypatch.chdir(ours[0].parent)
    for listed in ([*ours, other], [ours[0].parent], ["checkpoint-10", other]):
        with raises_kind("checkpoint-unknown-layout", "run/checkpoints"):
            open_checkpoints(listed)
