"""From a config file to a checked run config, and from the names in it to objects."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from next_core.errors import ConfigError, NextCoreError, PluginError, contradiction, describe, invalid_value
from next_core.plugins import Kind, make_chosen, registry, steps_or_jumps
from next_core.predictor import Predictor, TrajectoryPredictor
from next_core.run_config import (
    DATA_FILES,
    DEFAULT_BACKEND,
    DEFAULT_PREDICTOR,
    Choice,
    Guards,
    HubDataset,
    RunConfig,
    Schedule,
)
from next_core.settings import config_error
from next_core.sources.hub import NAME, hub_folder
from next_core.step_predictor import StepPredictor
from next_core.storage.yaml_files import load_yaml, parse_yaml

Blocks = Mapping[str, Mapping[str, Any]]  # Fields of `schedule` and `guards`, by block
STEP_SETTINGS = {"schedule": ("every", "average"), "guards": ("collapse", "time_limit", "probe")}
"""The settings of a run that apply to step scaling; the others are those of jumps."""


def load_config(path: str | Path) -> RunConfig:
    """Read and validate a config file. Raises ``ConfigError`` naming each wrong key, ``PluginError`` for a plug-in.

    The file's folder goes on ``sys.path``: a reward or plug-in given as ``module:name`` may lie next to the config.
    """
    file = Path(path)
    raw = load_yaml(file, "see `next-core schema`")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return make_config(raw, where=str(file), base=file.parent)


def make_config(raw: Mapping[str, Any], where: str = "config", base: Path | None = None) -> RunConfig:
    """Validate a config given as a mapping; relative paths count from ``base``."""
    given = raw
    try:
        raw = _with_auto(raw)
        predictor = _chosen_class("predictor", raw.get("predictor"))
        if predictor is not None:
            refuse_jump_settings(predictor, raw)
        config = RunConfig.model_validate(_with_recommended(raw))
    except ValidationError as error:
        raise _with_hint(config_error(error, where, RunConfig), given, where) from None
    except ConfigError as error:
        raise _with_hint(_located(error, where), given, where) from None
    config = _absolute(config, base or Path(), where)
    try:
        check_plugins(config)
    except (ConfigError, PluginError) as error:
        raise _located(error, where) from None
    return config


def _located(error: NextCoreError, where: str) -> NextCoreError:
    """Return the error with ``where`` in front of each line of its message."""
    return type(error)("\n".join(f"{where}: {line}" for line in error.message.splitlines()), kind=error.kind)


def _with_hint(error: NextCoreError, raw: Mapping[str, Any], where: str) -> NextCoreError:
    """Say where the settings come from that a user's own contradict, if a default predictor filled them in."""
    contradicts = error.kind in ("config-contradiction", "config-schedule")
    if not contradicts or "predictor" in raw or not ("schedule" in raw or "guards" in raw):
        return error
    return ConfigError(
        f"{error.message}\n{where}: the default predictor is '{DEFAULT_PREDICTOR}', and its recommended values fill "
        "the missing fields of schedule and guards",
        kind=error.kind,
    )


def _with_auto(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config with what ``auto`` means for its backend; unchanged where the backend is unknown."""
    backend = _chosen_class("backend", raw.get("backend", DEFAULT_BACKEND))
    predictor = raw.get("predictor", DEFAULT_PREDICTOR)
    return raw if backend is None else {**raw, "predictor": steps_or_jumps(predictor, backend)}


def refuse_jump_settings(predictor: type[Predictor], given: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for settings of jumps (in ``given``, by block) next to a predictor that makes none.

    The values that a resolved config has without any such setting are accepted.
    """
    if not issubclass(predictor, StepPredictor):
        return
    unused = []
    recommended = recommended_of(predictor, given)
    for block, settings in (("schedule", Schedule), ("guards", Guards)):
        own, default = given.get(block), {**settings().model_dump(), **recommended.get(block, {})}
        for key, value in own.items() if isinstance(own, Mapping) else ():
            if key in default and key not in STEP_SETTINGS[block] and value != default[key]:
                unused.append(f"{block}.{key}")
    if unused:
        raise contradiction(
            f"predictor '{predictor.name}' scales steps and makes no jumps: omit {', '.join(unused)}, or choose a "
            "predictor that jumps, such as 'adaptive-secant'"
        )


def _chosen_class(kind: Kind, chosen: Any) -> type[Any] | None:
    """Return the class of a plug-in that a raw config chooses; None for one that ``check_plugins`` refuses."""
    name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    try:
        return registry().get(kind, name) if isinstance(name, str) else None
    except PluginError:
        return None


def _with_recommended(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the schedule and guards that a config leaves out with those that its predictor recommends."""
    blocks = recommended_blocks(raw.get("predictor", DEFAULT_PREDICTOR), raw)
    given = {key: raw.get(key, {}) for key in blocks}
    return {**raw, **{key: {**blocks[key], **own} for key, own in given.items() if isinstance(own, Mapping)}}


def recommended_blocks(chosen: Any, given: Mapping[str, Any] | None = None) -> Blocks:
    """Return the schedule and guards that a config's predictor recommends; none for one that ``check_plugins`` refuses.

    See ``recommended_of``.
    """
    cls = _chosen_class("predictor", chosen)
    return {} if cls is None else recommended_of(cls, given or {})


def recommended_of(predictor: type[Predictor], given: Mapping[str, Any]) -> Blocks:
    """Return the schedule and guards that a predictor recommends next to ``given`` ones.

    One that scales steps has no use of ``observe``: it follows a given ``every``, which it would otherwise restrict to
    its divisors. Raises ``PluginError`` where a predictor's ``recommended`` is not of that form.
    """
    blocks: Any = predictor.recommended
    if not isinstance(blocks, Mapping) or not all(isinstance(fields, Mapping) for fields in blocks.values()):
        raise PluginError(
            f"predictor '{predictor.name}': recommended must map 'schedule' and 'guards' to their fields",
            kind="plugin-invalid",
        )
    schedule = given.get("schedule")
    if not issubclass(predictor, StepPredictor) or not isinstance(schedule, Mapping) or "every" not in schedule:
        return blocks
    return {**blocks, "schedule": {**blocks.get("schedule", {}), "observe": schedule["every"]}}


def check_plugins(config: RunConfig) -> None:
    """Raise ``PluginError`` or ``ConfigError`` for a plug-in that is unknown or whose settings are wrong."""
    kinds: tuple[Kind, ...] = ("backend", "predictor", "compressor")
    for kind in kinds:
        choice: Choice | None = getattr(config, kind)
        if choice is not None:
            registry().make_config(kind, choice.name, choice.fields, where=kind)
    predictor = make_chosen("predictor", config.predictor)
    if isinstance(predictor, TrajectoryPredictor):
        config.schedule.check_predictor(predictor, config.steps)
    reward = config.training.reward
    if ":" not in reward.name:
        registry().make_config("reward", reward.name, reward.fields, where="training.reward")


def absolute_path(base: Path, path: str | Path, where: str) -> Path:
    """Resolve a path of a config, relative to ``base``. Raises ``ConfigError`` for what cannot be a path."""
    try:
        found = (base / path).resolve()
        found.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a loop of links
        raise invalid_value(f"{where}: {str(path)[:100]!r} is no path ({describe(error)[:100]})") from None
    return found


def located(base: Path, path: str | Path, where: str) -> Path:
    """Return the absolute path; a name of the form that the Hub has is returned as it is, unless it begins a path."""
    found = absolute_path(base, path, where)
    named = NAME.fullmatch(str(path)) and found.suffix not in DATA_FILES
    return Path(path) if named and not found.parent.exists() else found


def _absolute(config: RunConfig, base: Path, where: str) -> RunConfig:
    """Return the config with absolute paths. Raises ``ConfigError`` for one that does not exist."""

    def found(path: Path) -> Path:
        path = located(base, path, where)
        if path.is_absolute() and not path.exists():
            raise ConfigError(f"{where}: {path} does not exist", kind="config-missing-file")
        return path

    def prompts(split: str, data: Path | HubDataset | None) -> Path | HubDataset | None:
        data = found(data) if isinstance(data, Path) else data
        if isinstance(data, Path) and not data.is_absolute():
            data = HubDataset(name=str(data))
        return data.model_copy(update={"split": data.split or split}) if isinstance(data, HubDataset) else data

    training, data = config.training, config.training.data
    moved = data.model_copy(update={key: prompts(key, value) for key, value in dict(data).items()})
    update = {"model": found(training.model), "data": moved}
    return config.model_copy(update={"training": training.model_copy(update=update)})


def with_model_folder(run: RunConfig, online: bool = True) -> RunConfig:
    """Return the run with the folder of its base model, where its config has a name of the Hub. See ``hub_folder``."""
    if run.training.model.is_absolute():
        return run
    update = {"model": hub_folder(str(run.training.model), online=online)}
    return run.model_copy(update={"training": run.training.model_copy(update=update)})


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
    for kind, place in places.items():
        reference = {"type": "string", "pattern": "^[^:]+:[^:]+$", "description": "module:Class"}
        options: list[dict[str, Any]] = [
            {"type": "string", "enum": registry().names(kind)},
            reference,
            {"type": "object", "properties": {"name": reference}, "required": ["name"]},
        ]
        if kind == "compressor":
            options.append({"type": "null"})
        for name in registry().names(kind):
            try:
                fields = registry().get(kind, name).config_class.model_json_schema()
            except Exception:  # a plug-in whose lazy import fails is listed by `plugins`
                continue
            definitions.update(fields.pop("$defs", {}))
            fields["properties"] = {"name": {"const": name}, **fields.get("properties", {})}
            fields["required"] = ["name", *fields.get("required", [])]
            options.append(fields)
        place.pop("$ref", None)
        place["anyOf"] = options
    definitions.pop("Choice", None)
    return schema


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["gate.window=25", "damping=0.5"]`` -> nested fields, values read as YAML. Raises ``ConfigError``."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise invalid_value(f"'{assignment}' is not of the form key=value")
        block: Any = fields
        *parents, last = key.split(".")
        for parent in parents:
            block = block.setdefault(parent, {}) if isinstance(block, dict) else block
        if not isinstance(block, dict) or last in block:
            raise contradiction(f"'{assignment}' contradicts an earlier assignment")
        block[last] = parse_yaml(value, f"the value of {key}")
    return fields
