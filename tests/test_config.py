"""The run config: a mistake is named by its key, with what was meant."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from next_core.config import dump_yaml, json_schema, load_config, make_config, parse_assignments
from next_core.errors import ConfigError
from next_core.plugins import make_chosen, registry
from next_core.run_config import Guards, RunConfig, Schedule
from next_core.storage.yaml_files import parse_yaml
from tests.errors import raises_kind

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the model and data of ``raw`` exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return tmp_path


def raw(**changes: Any) -> dict[str, Any]:
    """A valid config; ``training__learning_rate=0`` changes a nested key."""
    config: dict[str, Any] = {"steps": 100, "training": {"model": "base", "data": {"train": "train.jsonl"}}}
    for key, value in changes.items():
        *parents, last = key.split("__")
        block = config
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
    return config


@pytest.fixture
def load(folder: Path) -> Callable[..., RunConfig]:
    """``load(**changes)`` or ``load(text=...)``: the config as read from a file."""

    def read(text: str | None = None, **changes: Any) -> RunConfig:
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(raw(**changes)) if text is None else text)
        return load_config(file)

    return read


@pytest.mark.parametrize("every", [1, 2, 10])
def test_step_scaling_takes_any_every(load: Callable[..., RunConfig], every: int) -> None:
    config = load(schedule={"every": every})
    assert config.predictor.name == "step-scale"
    assert config.schedule.every == every
    assert make_config(config.model_dump(mode="json")) == config
    with raises_kind("config-contradiction", "schedule.observe"):
        load(schedule={"every": every, "observe": 3 * every})


def test_what_is_not_given_has_its_default(load: Callable[..., RunConfig]) -> None:
    config = load()
    assert (config.predictor.name, config.backend.name, config.training.reward.name) == (
        "step-scale",
        "trl",
        "math-verify",
    )
    recommended = registry().get("predictor", "step-scale").recommended
    assert config.schedule == Schedule(**recommended["schedule"])
    assert config.guards == Guards(**recommended["guards"])
    assert load(predictor="secant").schedule == Schedule()
    assert config.training.lora.rank == 8


@pytest.mark.parametrize(
    ("changes", "key", "meant"),
    [
        ({"step": 3}, "run.yaml.step", "steps"),
        ({"training__lerning_rate": 1}, "run.yaml.training.lerning_rate", "learning_rate"),
        ({"training__lora__rnk": 4}, "run.yaml.training.lora.rnk", "rank"),
        ({"predictor": {"name": "secant", "windw": 4}}, "predictor.windw", "window"),
        ({"predictor": {"name": "secant", "gate": {"flor": 4}}}, "predictor.gate.flor", "floor"),
        ({"backend": {"name": "trl", "arg": {}}}, "backend.arg", "args"),
        ({"compressor": {"name": "exact", "rank": 3}}, "compressor.rank", ""),
        ({"training__reward": {"name": "math-verify", "corect": 2.0}}, "training.reward.corect", "correct"),
    ],
)
def test_an_unknown_key_is_an_error_at_every_level_with_the_nearest_one(
    load: Callable[..., RunConfig], changes: dict[str, Any], key: str, meant: str
) -> None:
    with raises_kind("config-unknown-key", f"{key}: ", f"'{meant}'" if meant else ""):
        load(**changes)


def test_each_wrong_key_has_its_line_and_its_own_hint(load: Callable[..., RunConfig]) -> None:
    with raises_kind("config-invalid-value", "sceed: ", "'seed'", "training.beta: ", "(got -1)", "'settle'") as caught:
        load(sceed=1, training__beta=-1, schedule__setle=3)
    assert len(caught.value.message.splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "key", "given"),
    [
        ({"steps": "many"}, "steps", "'many'"),
        ({"steps": 0}, "steps", "0"),
        ({"seed": 2**32}, "seed", "4294967296"),  # NumPy takes no more
        ({"training__learning_rate": math.inf}, "training.learning_rate", "inf"),
        ({"training__temperature": math.nan}, "training.temperature", "nan"),
        ({"training__algorithm": "ppo"}, "training.algorithm", "'ppo'"),
        ({"training__data": ["train.jsonl"]}, "training.data", "['train.jsonl']"),
        ({"predictor": "secant", "schedule__alpha": -1}, "schedule.alpha", "-1"),
        ({"predictor": "secant", "guards__max_drop": 2}, "guards.max_drop", "2"),
        ({"predictor": 5}, "predictor", "5"),
        ({"predictor": {"name": "secant", "window": 0}}, "predictor.window", "0"),
        ({"control": "both"}, "control", "'both'"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range_is_named_with_what_was_given(
    load: Callable[..., RunConfig], changes: dict[str, Any], key: str, given: str
) -> None:
    with raises_kind("config-invalid-value", f"{key}: ", f"(got {given})"):
        load(**changes)


def test_what_is_missing_is_named(folder: Path) -> None:
    with raises_kind("config-invalid-value", "config.steps: ", "config.training.data.train: ") as caught:
        make_config({"training": {"model": "base", "data": {}}}, base=folder)
    assert len(caught.value.message.splitlines()) == 2
    with raises_kind("config-invalid-value", "config.predictor.name: "):
        make_config(raw(predictor={"window": 3}), base=folder)


@pytest.mark.parametrize(
    ("changes", "kind", "names"),
    [
        ({"schedule": {"observe": 52, "every": 5}}, "config-contradiction", ["observe (52)", "every (5)"]),
        ({"schedule": {"every": 10, "jump_every": 25}}, "config-contradiction", ["jump_every (25)", "every (10)"]),
        ({"schedule": {"jumps": 2}}, "config-contradiction", ["jumps: 2", "jump_every"]),
        ({"guards": {"recovery": 10, "probe": False}}, "config-contradiction", ["guards: recovery", "probe: true"]),
        ({"schedule": {"observe": 60, "settle": 50}}, "config-schedule", ["observe (60)", "settle (50)", "100"]),
        (
            {"guards": {"recovery": 10}, "schedule": {"settle": 5}},
            "config-schedule",
            ["settle (5)", "guards.recovery (10)"],
        ),
    ],
)
def test_settings_that_contradict_each_other_or_the_run_are_refused(
    load: Callable[..., RunConfig], changes: dict[str, Any], kind: str, names: list[str]
) -> None:
    with raises_kind(kind, "run.yaml", *names):
        load(predictor="secant", **changes)


def test_a_contradiction_of_values_the_default_predictor_fills_in_is_explained(load: Callable[..., RunConfig]) -> None:
    with raises_kind("config-contradiction", "schedule.observe", "'adaptive-secant'", "default predictor is 'auto'"):
        load(schedule={"observe": 60, "every": 10})
    with raises_kind("config-contradiction", "guards.recovery", "'step-scale'"):
        load(predictor="step-scale", guards={"recovery": 10})


def test_a_run_shorter_than_a_block_of_step_scaling_is_only_too_short_for_jumps(load: Callable[..., RunConfig]) -> None:
    assert load(predictor="step-scale", steps=3).steps == 3
    with raises_kind("config-schedule", "observe (50)", "3 steps"):
        load(predictor="secant", steps=3)


def test_auto_means_step_scaling_where_the_backend_can_reach_the_optimizer(load: Callable[..., RunConfig]) -> None:
    assert load(predictor={"name": "auto", "decay": 0.25}).predictor.fields == {"decay": 0.25}
    assert load(predictor="auto").predictor.name == "step-scale"
    launched = {"name": "openrlhf", "python": sys.executable}
    assert load(predictor="auto", backend=launched).predictor.name == "step-scale"
    resolved = yaml.safe_load(dump_yaml(load()))
    assert dump_yaml(load(text=yaml.safe_dump(resolved))) == dump_yaml(load())
    assert load(predictor="adaptive-secant", schedule={"settle": 20}).schedule.settle == 20


def test_an_unknown_plugin_is_named_with_the_nearest_one(load: Callable[..., RunConfig]) -> None:
    with raises_kind("plugin-unknown", "run.yaml", "unknown backend 'nothing'"):
        load(backend="nothing")
    with raises_kind("plugin-unknown", "'math-verfy'", "'math-verify'"):
        load(training__reward="math-verfy")


def test_a_predictor_may_be_a_local_class(
    load: Callable[..., RunConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "next_to_config.py").write_text(
        "from next_predictors.secant import Secant\n"
        "class Mine(Secant):\n    name = 'mine'\n    recommended = {'schedule': {'every': 2}}\n"
    )
    config = load(predictor={"name": "next_to_config:Mine", "window": 8})
    assert make_chosen("predictor", config.predictor).config.window == 8
    assert config.schedule.every == 2
    with raises_kind("config-unknown-key", "predictor.windw", "'window'"):
        load(predictor={"name": "next_to_config:Mine", "windw": 7})
    with raises_kind("plugin-broken", "nowhere:Mine"):
        load(predictor="nowhere:Mine")


def test_a_key_that_is_given_twice_or_is_a_number_is_named(load: Callable[..., RunConfig]) -> None:
    with raises_kind("config-yaml", "line 3"):
        load(text="steps: 1\nseed: 2\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(text="1: 2\n")


def test_a_long_value_is_shown_cut(load: Callable[..., RunConfig]) -> None:
    with raises_kind("config-invalid-value", "steps") as caught:
        load(steps="x" * 100_000)
    assert len(str(caught.value)) < 1000


def test_yaml_merge_keys_give_way_to_the_keys_beside_them() -> None:
    text = "base: &base {rank: 4, alpha: 8}\nlora: {<<: *base, alpha: 16}\n"
    assert parse_yaml(text, "here")["lora"] == {"rank": 4, "alpha": 16}


def test_numbers_as_people_write_them_are_numbers_and_what_only_looks_like_one_is_text() -> None:
    for text in ("1e-4", "1E-4", "1.e-4", ".1e-3", "0.0001", "+1e-4"):
        assert parse_yaml(f"rate: {text}", "here") == {"rate": 1e-4}
    for text in ("e-4", "1e", "1e-4x", "v1e-4"):
        assert parse_yaml(f"rate: {text}", "here") == {"rate": text}


@pytest.mark.parametrize(
    ("key", "path"), [("model", "models/a/nowhere"), ("data__train", "data/nowhere.jsonl"), ("data__test", "nowhere")]
)
def test_a_path_that_does_not_exist_is_named(load: Callable[..., RunConfig], key: str, path: str) -> None:
    with raises_kind("config-missing-file", path):
        load(**{f"training__{key}": path})


def test_paths_count_from_the_config_file(
    load: Callable[..., RunConfig],
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config = load()
    assert config.training.model == (folder / "base").resolve()
    assert config.training.data.train == (folder / "train.jsonl").resolve()


def test_the_resolved_config_reads_back_as_itself(load: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = load(
        training__learning_rate=1e-5,
        training__lora=None,
        predictor={"name": "secant", "gate": {"floor": 0.1, "window": 40}, "window": 20},
        schedule={"observe": 20, "every": 10, "jump_every": 20, "jumps": 3, "settle": 10},
        guards={"max_norm_ratio": None, "recovery": 10},
    )
    copy = tmp_path / "elsewhere" / "config.yaml"
    copy.parent.mkdir()
    copy.write_text(dump_yaml(config))
    assert load_config(copy) == config
    assert dump_yaml(load_config(copy)) == dump_yaml(config)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid_and_known_to_the_schema(example: Path) -> None:
    load_config(example)
    jsonschema.validate(parse_yaml(example.read_text(), example.name), json_schema())


def test_assignments_become_nested_fields_read_as_yaml() -> None:
    given = ["window=25", "gate.floor=1e-1", "gate.width=0.5", "space=merged", "metric=", "list=[1, 2]", "a=b=c"]
    assert parse_assignments(given) == {
        "window": 25,
        "gate": {"floor": 0.1, "width": 0.5},
        "space": "merged",
        "metric": None,
        "list": [1, 2],
        "a": "b=c",
    }
    assert parse_assignments([]) == {}


@pytest.mark.parametrize(
    ("given", "kind", "name"),
    [
        (["window"], "config-invalid-value", "'window'"),
        (["=3"], "config-invalid-value", "'=3'"),
        (["gate..floor=3"], "config-invalid-value", "'gate..floor=3'"),
        (["gate=1", "gate.floor=3"], "config-contradiction", "'gate.floor=3'"),
        (["gate.floor=3", "gate=1"], "config-contradiction", "'gate=1'"),
        (["window=3", "window=4"], "config-contradiction", "'window=4'"),
    ],
)
def test_an_assignment_that_cannot_be_read_is_refused(given: list[str], kind: str, name: str) -> None:
    with raises_kind(kind, name):
        parse_assignments(given)
