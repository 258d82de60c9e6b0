"""The run config: a mistake is named by its key, with what was meant."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from next_core.config import dump_yaml, json_schema, load_config, make_config, parse_assignments
from next_core.errors import ConfigError, PluginError
from next_core.plugins import registry
from next_core.run_config import Choice, Guards, RunConfig, Schedule
from next_core.storage.yaml_files import parse_yaml

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


def test_what_is_not_given_has_its_default(load: Callable[..., RunConfig]) -> None:
    config = load()
    assert (config.predictor.name, config.backend.name, config.training.reward.name) == ("auto", "trl", "math-verify")
    recommended = registry().get("predictor", "auto").recommended
    assert config.schedule == Schedule(**recommended["schedule"])
    assert config.guards == Guards(**recommended["guards"])
    assert load(predictor="secant").schedule == Schedule()
    assert config.training.lora is not None
    assert config.training.lora.rank == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, "run.yaml.step: unknown key; did you mean 'steps'? Known keys: steps, seed, "),
        ({"training__lerning_rate": 1}, "run.yaml.training.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ({"training__lora__rnk": 4}, "run.yaml.training.lora.rnk: unknown key; did you mean 'rank'?"),
        ({"training__data__tain": "x"}, "run.yaml.training.data.tain: unknown key; did you mean 'train'?"),
        ({"schedule__horizn": 4}, "run.yaml.schedule.horizn: unknown key; did you mean 'horizon'?"),
        ({"guards__max_norm": 4}, "run.yaml.guards.max_norm: unknown key; did you mean 'max_norm_ratio'?"),
        ({"predictor": {"name": "secant", "windw": 4}}, "predictor.windw: unknown key; did you mean 'window'?"),
        (
            {"predictor": {"name": "secant", "gate": {"flor": 4}}},
            "predictor.gate.flor: unknown key; did you mean 'floor'?",
        ),
        ({"backend": {"name": "trl", "arg": {}}}, "backend.arg: unknown key; did you mean 'args'?"),
        ({"compressor": {"name": "exact", "rank": 3}}, "compressor.rank: unknown key"),
        (
            {"training__reward": {"name": "math-verify", "corect": 2.0}},
            "training.reward.corect: unknown key; did you mean 'correct'?",
        ),
    ],
)
def test_an_unknown_key_is_an_error_at_every_level_with_the_nearest_one(
    load: Callable[..., RunConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert message in str(caught.value)


def test_each_wrong_key_has_its_line_and_its_own_hint(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(sceed=1, training__beta=-1, schedule__setle=3)
    message = str(caught.value)
    assert "sceed: unknown key; did you mean 'seed'?" in message
    assert "training.beta: Input should be greater than or equal to 0 (got -1)" in message
    assert "schedule.setle: unknown key; did you mean 'settle'?" in message
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "key", "given"),
    [
        ({"steps": "many"}, "steps", "'many'"),
        ({"steps": 0}, "steps", "0"),
        ({"steps": 1.5}, "steps", "1.5"),
        ({"steps": None}, "steps", "None"),
        ({"training__learning_rate": 0}, "training.learning_rate", "0"),
        ({"training__learning_rate": math.inf}, "training.learning_rate", "inf"),
        ({"training__temperature": math.nan}, "training.temperature", "nan"),
        ({"training__generations": 1}, "training.generations", "1"),
        ({"training__algorithm": "ppo"}, "training.algorithm", "'ppo'"),
        ({"training__lora": 8}, "training.lora", "8"),
        ({"training__data": ["train.jsonl"]}, "training.data", "['train.jsonl']"),
        ({"training__model": 5}, "training.model", "5"),
        ({"schedule__alpha": math.inf}, "schedule.alpha", "inf"),
        ({"schedule__alpha": -1}, "schedule.alpha", "-1"),
        ({"schedule__horizon": 0}, "schedule.horizon", "0"),
        ({"schedule__settle": -1}, "schedule.settle", "-1"),
        ({"guards__max_drop": 2}, "guards.max_drop", "2"),
        ({"predictor": 5}, "predictor", "5"),
        ({"predictor": {"name": "secant", "window": 0}}, "predictor.window", "0"),
        ({"predictor": {"name": "secant", "damping": math.inf}}, "predictor.damping", "inf"),
        ({"control": "both"}, "control", "'both'"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range_is_named_with_what_was_given(
    load: Callable[..., RunConfig], changes: dict[str, Any], key: str, given: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert f"{key}: " in str(caught.value)
    assert f"(got {given})" in str(caught.value)


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"training": {"model": "base", "data": {}}}, base=folder)
    assert caught.value.message.splitlines() == [
        "config.steps: Field required",
        "config.training.data.train: Field required",
    ]
    with pytest.raises(ConfigError, match=r"config\.predictor\.name: Field required"):
        make_config(raw(predictor={"window": 3}), base=folder)


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ({"observe": 52, "every": 5}, "observe (52) must be a multiple of every (5)"),
        ({"observe": 50, "every": 10, "jump_every": 25}, "jump_every (25) must be a multiple of every (10)"),
        ({"observe": 60, "every": 10, "settle": 50}, "no jump would ever happen: observe (60) + settle (50) exceed"),
        ({"observe": 150, "every": 10}, "no jump would ever happen: observe (150) + settle (0) exceed"),
        ({"jumps": 2}, "jumps: 2 needs jump_every"),
    ],
)
def test_a_schedule_that_contradicts_itself_or_the_run_is_refused_with_the_reason(
    load: Callable[..., RunConfig], schedule: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(schedule=schedule, predictor="secant")
    assert reason in str(caught.value)


def test_gaps_that_the_default_fills_are_told_where_they_contradict(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"jump_every \(2\) must be a multiple of every \(10\)") as caught:
        load(schedule={"observe": 60, "every": 10})
    assert "without a predictor it is 'auto'" in str(caught.value)


def test_a_recovery_that_the_end_of_the_run_would_cut_off_is_refused(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"settle \(5\) must be at least guards.recovery \(10\)"):
        load(guards={"recovery": 10}, schedule={"settle": 5}, predictor="secant")
    assert load(guards={"recovery": 10}, schedule={"settle": 10}, predictor="secant").guards.recovery == 10


def test_a_recovery_without_a_probe_is_refused(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"guards: recovery needs probe: true"):
        load(guards={"recovery": 10, "probe": False})


def test_an_unknown_plugin_is_a_plugin_error_with_the_nearest_one(load: Callable[..., RunConfig]) -> None:
    for place in ("predictor", "backend", "compressor"):
        with pytest.raises(PluginError, match=f"unknown {place} 'nothing'"):
            load(**{place: "nothing"})
    with pytest.raises(PluginError, match=r"unknown reward 'math-verfy'\. Did you mean 'math-verify'\?"):
        load(training__reward="math-verfy")


def test_a_reward_of_the_users_own_keeps_its_arguments(load: Callable[..., RunConfig]) -> None:
    reward = load(training__reward={"name": "my.module:score", "strict": True}).training.reward
    assert (reward.name, reward.fields) == ("my.module:score", {"strict": True})


def test_a_bare_name_stands_for_a_plugin_with_its_defaults() -> None:
    assert Choice.model_validate("secant") == Choice(name="secant")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("steps: 10\nsteps: 20\n", "the key 'steps' is there twice"),
        ("steps: [1, 2\n", "is not valid YAML"),
        ("steps: 1\n\tseed: 2\n", "is not valid YAML"),
        ("a: *nobody\n", "found undefined alias 'nobody'"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("? [1, 2]\n: 3\n", "found unhashable key"),
        ("a: 2024-13-45\n", "month must be in 1..12"),
        ("a: !!int many\n", "is not valid YAML"),
        ("a: !!bool maybe\n", "is not valid YAML"),
        ("a: !!timestamp soon\n", "is not valid YAML"),
        ("a: &x [*x]\n", "an alias stands within what it names"),
        ("a: \x00\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("- steps\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("1: 2\n", "run.yaml.1: Keys should be strings"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_named_with_the_reason(
    load: Callable[..., RunConfig], text: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text=text)
    assert "run.yaml" in str(caught.value)
    assert reason in str(caught.value)


def test_the_line_of_a_yaml_mistake_is_named(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="line 3"):
        load(text="steps: 1\nseed: 2\nseed: 3\n")


@pytest.mark.parametrize("place", ["steps: *g", "training: {reward: {name: 'a:b', x: *g}}", "{*g : 1}"])
def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(
    load: Callable[..., RunConfig], place: str
) -> None:
    bomb = "".join(
        f"x{i}: &{b} [{', '.join([f'*{a}'] * 30)}]\n" for i, (a, b) in enumerate(zip("abcdef", "bcdefg", strict=True))
    )
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load(text=f"x: &a [lol, lol, lol]\n{bomb}{place}\n")
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 1000


def test_a_long_value_is_shown_cut(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(steps="x" * 100_000)
    assert len(str(caught.value)) < 1000


def test_yaml_merge_keys_give_way_to_the_keys_beside_them() -> None:
    text = "base: &base {rank: 4, alpha: 8}\nlora: {<<: *base, alpha: 16}\n"
    assert parse_yaml(text, "here")["lora"] == {"rank": 4, "alpha": 16}


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", ".1e-3", "0.0001", "+1e-4"])
def test_numbers_as_people_write_them_are_numbers(number: str) -> None:
    assert parse_yaml(f"rate: {number}", "here") == {"rate": 1e-4}


@pytest.mark.parametrize("text", ["e-4", "1e", "1e-4x", "v1e-4"])
def test_what_only_looks_like_a_number_stays_text(text: str) -> None:
    assert parse_yaml(f"rate: {text}", "here") == {"rate": text}


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load_config(folder / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(folder)
    (folder / "latin.yaml").write_bytes(b"steps: 1 # \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text"):
        load_config(folder / "latin.yaml")


@pytest.mark.parametrize(
    "changes",
    [{"training__model": "nowhere"}, {"training__data__train": "nowhere"}, {"training__data__test": "nowhere"}],
)
def test_a_path_that_does_not_exist_is_named(load: Callable[..., RunConfig], changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load(**changes)


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


def test_a_config_does_not_change(load: Callable[..., RunConfig]) -> None:
    config = load()
    for block in (config, config.training, config.training.lora, config.training.data, config.schedule, config.guards):
        name = next(iter(type(block).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, name, 1)


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
    schema = json_schema()

    def check(value: Mapping[str, Any], block: Mapping[str, Any]) -> None:
        if "$ref" in block:
            block = schema["$defs"][block["$ref"].rpartition("/")[2]]
        assert set(value) <= set(block["properties"])
        assert set(block.get("required", ())) <= set(value)
        for key, inner in value.items():
            options = [block["properties"][key], *block["properties"][key].get("anyOf", ())]
            if key in ("predictor", "backend", "compressor", "reward"):
                assert any(fits(inner, option) for option in options), inner
            elif isinstance(inner, dict):
                [option] = [o for o in options if "$ref" in o or "properties" in o]
                check(inner, option)

    def fits(value: Any, option: Mapping[str, Any]) -> bool:
        if isinstance(value, str):
            pattern = option.get("pattern")
            return value in option.get("enum", ()) or (pattern is not None and re.fullmatch(pattern, value) is not None)
        known = option.get("properties", {})
        return known.get("name", {}).get("const") == value["name"] and set(value) <= set(known)

    check(parse_yaml(example.read_text(), example.name), schema)


def test_the_schema_has_the_fields_of_every_installed_predictor() -> None:
    schema = json_schema()
    options = schema["properties"]["predictor"]["anyOf"]
    [secant] = [o for o in options if o.get("properties", {}).get("name", {}).get("const") == "secant"]
    assert {"name", "window", "damping", "gate", "space"} <= set(secant["properties"])
    assert secant["additionalProperties"] is False
    assert "secant" in options[0]["enum"]
    assert {"GateConfig", "Schedule", "Guards"} <= set(schema["$defs"])


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
    ("given", "reason"),
    [
        (["window"], "'window' is not of the form key=value"),
        (["=3"], "'=3' is not of the form key=value"),
        (["gate..floor=3"], "is not of the form key=value"),
        (["gate=1", "gate.floor=3"], "contradicts an earlier value of 'gate'"),
        (["gate.floor=3", "gate=1"], "contradicts an earlier value of 'gate'"),
        (["window=3", "window=4"], "contradicts an earlier value of 'window'"),
        (["window=[1"], "the value of window is not valid YAML"),
    ],
)
def test_an_assignment_that_cannot_be_read_is_refused(given: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignments(given)
    assert reason in str(caught.value)


def test_guards_and_schedule_refuse_unknown_keys_from_python_too() -> None:
    with pytest.raises(ValidationError):
        Guards(max_dorp=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Schedule(observ=10)  # type: ignore[call-arg]
