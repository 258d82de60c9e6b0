"""A plan says beforehand what the work then takes."""

from pathlib import Path
from typing import Any

import pytest

from next_core import planning
from next_core.checkpoints import open_checkpoints
from next_core.config import make_config
from next_core.history.history import History
from next_core.planning import gib
from next_core.plugins import make_applier, make_predictor, registry
from next_core.predictor import Work
from next_core.run_config import RunConfig
from next_core.types import Parameter
from tests.conftest import STEPS, LoraRun
from tests.cycle.descent import Descent
from tests.errors import raises_kind
from tests.history.test_history import Counting

SPACES = {"factors": 0, "merged": 1}


@pytest.fixture
def config(base: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text("")
    training = {"model": base, "data": {"train": tmp_path / "train.jsonl"}, "lora": {"rank": 4}}
    schedule = {"observe": 50, "every": 5, "horizon": 10, "jump_every": 10, "settle": 10}
    return {"steps": 100, "training": training, "schedule": schedule, "predictor": "adaptive-secant"}


@pytest.mark.parametrize(
    ("predictor", "wanted"), [("next-mlp", {"global", "local", "target"}), ("alpharl", {"global"})]
)
def test_the_deltas_are_those_the_predictor_decomposes(predictor: str, wanted: set[str], lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    made = make_predictor(predictor, **({"epochs": 1} if predictor == "next-mlp" else {}))
    counting = Counting()
    made.fit(History(source, 1, counting)).predict(20)
    plan = planning.plan_checkpoints(source, made, 20)
    moving = len(source.parameters) - 1  # one of them is frozen, which names and shapes do not tell
    assert plan["compute"]["deltas"] / len(source.parameters) == counting.deltas / moving
    assert {name for name in ("global", "local", "target") if name in made.requires} == wanted


@pytest.mark.parametrize("space", SPACES)
def test_the_adapter_is_as_large_as_was_said(space: str, lora_run: LoraRun, tmp_path: Path) -> None:
    source = open_checkpoints(lora_run.path)
    predictor = make_predictor("secant", space=space)
    plan = planning.plan_checkpoints(source, predictor, 10, out=tmp_path)
    assert plan["read"]["bytes a checkpoint"] == sum(4 * 4 * sum(p.shape) for p in source.parameters)
    make_applier("peft-adapter").apply(predictor.fit(History(source)).predict(10), out=tmp_path / "out")
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    # In merged space the rank grows by that of the update, which may be more than one.
    assert size >= plan["write"]["bytes"]
    if space == "factors":
        assert size < plan["write"]["bytes"] + 8192


def test_a_merged_model_is_as_large_as_its_backbone(lora_run: LoraRun, tmp_path: Path) -> None:
    source = open_checkpoints(lora_run.path, lora_run.base)
    plan = planning.plan_checkpoints(source, make_predictor("secant"), 10, applier="merged-model", out=tmp_path)
    assert plan["write"]["bytes"] == (lora_run.base / "model.safetensors").stat().st_size
    with raises_kind("config-missing-backbone", "--backbone"):
        planning.plan_checkpoints(
            open_checkpoints(lora_run.path), make_predictor("secant"), 10, applier="merged-model", out=tmp_path
        )


def test_notes_name_no_motion_and_a_full_disk(
    lora_run: LoraRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_checkpoints(lora_run.path)
    plan = planning.plan_checkpoints(source, make_predictor("next-mlp"), 999)
    assert any("next-mlp would predict nothing" in note for note in plan["notes"])
    with raises_kind("config-invalid-value", "horizon"):
        planning.plan_checkpoints(source, make_predictor("secant"), 0)
    monkeypatch.setattr(planning, "free_bytes", lambda path: 10)
    plan = planning.plan_checkpoints(source, make_predictor("secant"), 10, out=tmp_path)
    assert any("10 B free" in note for note in plan["notes"])


def test_a_run_names_its_jumps_checkpoints_and_their_size(config: dict[str, Any], tmp_path: Path) -> None:
    plan = planning.plan_run(make_config(config), tmp_path / "deep" / "run")
    assert "trainer" not in plan["compute"]
    matrices = 2 * 7
    assert plan["compute"]["matrices"] == matrices
    assert plan["compute"]["jumps after"] == [50, 60, 70, 80, 90]
    assert plan["compute"]["roll-outs"] == 100 * 16 * 8
    each = plan["write"]["bytes a checkpoint"]
    assert plan["write"]["checkpoints"] == 21
    assert plan["write"]["bytes of checkpoints"] == 21 * each
    assert plan["write"]["bytes of jumps"] == 5 * each
    assert plan["time"]["RL"] is None
    assert not (tmp_path / "deep").exists()


def test_step_scaling_takes_no_checkpoints_and_states_its_memory(config: dict[str, Any], tmp_path: Path) -> None:
    config = {key: value for key, value in config.items() if key != "schedule"} | {"save_every": 50}
    plan = planning.plan_run(make_config(config | {"predictor": "step-scale"}), tmp_path / "run")
    each = plan["write"]["bytes a checkpoint"]
    assert (plan["write"]["checkpoints"], plan["compute"]["jumps after"]) == (0, [])
    assert plan["memory"]["bytes"] == 6 * each
    assert plan["write"]["bytes of the trainer's"] == 2 * (3 + 3) * each
    assert plan["write"]["bytes of states to return to"] == 12 * each


class Launched(Descent):
    name = "launched"

    def __init__(self, config: Any) -> None:
        super().__init__()

    def describe(self, run: RunConfig, out: Path) -> dict[str, Any]:
        return {"command": ["train", "--steps", str(run.steps)]}


def test_a_plan_shows_the_command(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry(), "_entries", dict(registry()._entries))
    registry().add(Launched)
    plan = planning.plan_run(make_config(config | {"backend": "launched"}), tmp_path / "run")
    assert plan["compute"]["trainer"] == {"command": ["train", "--steps", "100"]}


def test_a_full_parameter_run_is_larger(config: dict[str, Any], tmp_path: Path) -> None:
    lora = planning.plan_run(make_config(config), tmp_path)
    full = planning.plan_run(make_config(config | {"training": config["training"] | {"lora": None}}), tmp_path)
    assert full["read"]["trained"] == "all parameters"
    assert full["write"]["bytes"] > lora["write"]["bytes"]
    assert full["compute"]["matrices"] == 2 * 7 + 2  # embeddings and head as well


@pytest.mark.parametrize(
    ("targets", "count"), [("all-linear", 14), (["q_proj", "v_proj"], 4), (r".*layers\.0\..*_proj", 7), (["x_proj"], 0)]
)
def test_trained_matrices_are_those_peft_adapts(targets: str | list[str], count: int, config: dict[str, Any]) -> None:
    training = config["training"] | {"lora": {"rank": 4, "target_modules": targets}}
    assert len(planning.trained_parameters(make_config(config | {"training": training}))) == count


def test_work_grows_as_it_should() -> None:
    matrix = Parameter("w", (4864, 896), 64)
    steps = range(10, 160, 10)
    spans = planning.spans_read(make_predictor("next-mlp"), steps, 50)
    assert len(spans) == 15 + 14 + 10
    once = planning.compress_work(matrix, spans, 1, 4)
    # 39 blocks of r x r on either side of the matrix are most of it.
    assert 0.8 < 39 * 2 * 64**2 * (4864 + 896) / once.flops <= 1
    wide = planning.compress_work(Parameter("w", (4864, 896), 128), spans, 1, 4)
    assert 3.5 < wide.flops / once.flops < 4.5
    assert planning.compress_work(matrix, [], 1, 4) == Work()
    dense = planning.compress_work(Parameter("w", (4864, 896)), spans, 1, 2)
    assert dense.bytes > once.bytes


def test_the_steps_of_the_fixture_are_what_is_read(lora_run: LoraRun) -> None:
    plan = planning.plan_checkpoints(open_checkpoints(lora_run.path), make_predictor("next-mlp"), 20)
    assert plan["read"]["steps"] == list(STEPS)
    # Each once for its deltas; the two newest before, to see what moves.
    assert plan["read"]["bytes"] == (len(STEPS) + 2) * plan["read"]["bytes a checkpoint"]
    gram = planning.plan_checkpoints(open_checkpoints(lora_run.path), make_predictor("relex"), 20)
    assert gram["read"]["bytes"] == (len(STEPS) + 2) * plan["read"]["bytes a checkpoint"]


def test_bytes_have_three_digits_and_no_exponent() -> None:
    shown = {999: "999 B", 1023: "0.999 KiB", 1023 * 1024: "0.999 MiB", 2.5 * 1024**3: "2.5 GiB"}
    assert [gib(count) for count in shown] == list(shown.values())
