"""From a config file to a checked run config, and from the names in it to objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from next_core.errors import ConfigError, PluginError, describe
from next_core.plugins import KINDS, Kind, make_chosen, registry
from next_core.run_config import DEFAULT_PREDICTOR, Choice, RunConfig
from next_core.settings import explain
from next_core.storage.yaml_files import load_yaml, parse_yaml


def load_config(path: str | Path) -> RunConfig:
    """Read and validate a config file. Raises ``ConfigError`` naming each wrong key, ``PluginError`` for a name."""
    file = Path(path)
    return make_config(load_yaml(file, "see `next-core schema`"), where=str(file), base=file.parent)


def make_config(raw: Mapping[str, Any], where: str = "config", base: Path | None = None) -> RunConfig:
    """Validate a config given as a mapping; relative paths count from ``base``."""
    try:
        config = RunConfig.model_validate(_with_recommended(raw))
    except ValidationError as error:
        said = explain(error, where, RunConfig)
        contradicts = any(item["type"] == "value_error" for item in error.errors())
        if contradicts and "predictor" not in raw and ("schedule" in raw or "guards" in raw):
            said += f"\n{where}: without a predictor it is '{DEFAULT_PREDICTOR}'; what it is made for fills the gaps"
        raise ConfigError(said) from None
    config = _absolute(config, base or Path(), where)
    for path in _paths(config):
        if not path.exists():
            raise ConfigError(f"{where}: {path} does not exist")
    try:
        check_plugins(config)
    except (ConfigError, PluginError) as error:
        raise type(error)(
            "\n".join(f"{where}: {line}" for line in error.message.splitlines()), kind=error.kind
        ) from None
    return config


def _with_recommended(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the schedule and the guards that a config leaves out with those its predictor recommends."""
    chosen = raw.get("predictor", DEFAULT_PREDICTOR)
    name = chosen if isinstance(chosen, str) else chosen.get("name") if isinstance(chosen, Mapping) else None
    if not isinstance(name, str) or name not in registry().names("predictor"):
        return dict(raw)  # ``check_plugins`` reports it
    blocks = registry().get("predictor", name).recommended
    if not isinstance(blocks, Mapping) or not all(isinstance(fields, Mapping) for fields in blocks.values()):
        raise PluginError(f"predictor '{name}': recommended must map 'schedule' and 'guards' to their fields")
    given = {key: raw.get(key, {}) for key in blocks}
    return {**raw, **{key: {**blocks[key], **own} for key, own in given.items() if isinstance(own, Mapping)}}


def check_plugins(config: RunConfig) -> None:
    """Raise ``PluginError`` or ``ConfigError`` for a plug-in that is unknown or whose fields are wrong."""
    kinds: tuple[Kind, ...] = ("backend", "predictor", "compressor")
    for kind in kinds:
        choice: Choice | None = getattr(config, kind)
        if choice is not None:
            registry().make_config(kind, choice.name, choice.fields, where=kind)
    config.schedule.check_predictor(make_chosen("predictor", config.predictor), config.steps)
    reward = config.training.reward
    if ":" not in reward.name:
        registry().make_config("reward", reward.name, reward.fields, where="training.reward")


def absolute_path(base: Path, path: str | Path, where: str) -> Path:
    """A path of a config, from the folder it counts from. Raises ``ConfigError`` for one that can be none."""
    try:
        found = (base / path).resolve()
        found.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a loop of links
        raise ConfigError(f"{where}: {str(path)[:100]!r} is no path ({describe(error)[:100]})") from None
    return found


def _absolute(config: RunConfig, base: Path, where: str) -> RunConfig:
    data = config.training.data
    moved = {k: absolute_path(base, v, where) if v is not None else None for k, v in dict(data).items()}
    model = absolute_path(base, config.training.model, where)
    training = config.training.model_copy(update={"model": model, "data": data.model_copy(update=moved)})
    return config.model_copy(update={"training": training})


def _paths(config: RunConfig) -> list[Path]:
    data = config.training.data
    return [p for p in (config.training.model, data.train, data.validation, data.test) if p is not None]


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the run config, with the fields of every plug-in that is installed."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    places: dict[Kind, dict[str, Any]] = {
        "backend": schema["properties"]["backend"],
        "predictor": schema["properties"]["predictor"],
        "compressor": schema["properties"]["compressor"],
        "reward": definitions["TrainingSettings"]["properties"]["reward"],
    }
    for kind in KINDS:
        if kind not in places:
            continue
        options: list[dict[str, Any]] = [{"type": "string", "enum": registry().names(kind)}]
        if kind == "compressor":
            options.append({"type": "null"})
        if kind == "reward":
            options.append({"type": "string", "pattern": "^[^:]+:[^:]+$"})
        for name in registry().names(kind):
            try:
                fields = registry().get(kind, name).config_class.model_json_schema()
            except Exception:  # a plug-in whose lazy import fails is listed by `plugins`
                continue
            definitions.update(fields.pop("$defs", {}))
            fields["properties"] = {"name": {"const": name}, **fields.get("properties", {})}
            fields["required"] = ["name", *fields.get("required", [])]
            options.append(fields)
        places[kind].pop("$ref", None)
        places[kind]["anyOf"] = options
    definitions.pop("Choice", None)
    return schema


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["gate.window=25", "damping=0.5"]`` -> nested fields, values read as YAML. Raises ``ConfigError``."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"'{assignment}' is not of the form key=value")
        block = fields
        *parents, last = key.split(".")
        for parent in parents:
            block = block.setdefault(parent, {})
            if not isinstance(block, dict):
                raise ConfigError(f"'{assignment}' contradicts an earlier value of '{parent}'")
        if last in block:
            raise ConfigError(f"'{assignment}' contradicts an earlier value of '{last}'")
        block[last] = parse_yaml(value, f"the value of {key}")
    return fields
