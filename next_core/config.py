"""The run config: one YAML file, every key known, every plug-in chosen by name."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from next_core.cycle.guards import Guards
from next_core.cycle.schedule import Schedule
from next_core.errors import ConfigError, PluginError
from next_core.executor import Executor
from next_core.plugins import KINDS, Kind, describe, explain, registry
from next_core.reading import read_text

DEFAULT_PREDICTOR = "auto"
"""What a run extrapolates with where nothing is said; docs/benchmarks/auto.md has the figures."""
MOST_STEPS = 1_000_000
"""RL steps of a run; a schedule is checked step by step."""


class Frozen(BaseModel):
    """Immutable; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(BaseModel):
    """A plug-in by name with its own fields; the bare name alone will do."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="The plug-in's registered name")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def fields(self) -> dict[str, Any]:
        """The plug-in's own settings."""
        return dict(self.model_extra or {})

    def make(self, kind: Kind) -> Any:
        """The plug-in, with its validated config."""
        return registry().make(kind, self.name, **self.fields)


class LoraSettings(Frozen):
    """The trained adapter."""

    rank: int = Field(8, ge=1, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; the scaling is alpha / r")
    target_modules: str | list[str] = Field("all-linear", description="Which layers, as PEFT names them")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r)")


class DataSettings(Frozen):
    """JSON-lines files (or what `datasets` reads), one object a line, with the columns `prompt` and `answer`."""

    train: Path = Field(description="Prompts to train on")
    validation: Path | None = Field(None, description="Prompts of the probe that guards jumps; default: test")
    test: Path | None = Field(None, description="Prompts of the accuracies that are reported; default: validation")


class TrainingSettings(Frozen):
    """What is trained and how: the same words for every backend."""

    model: Path = Field(description="Folder of the base model, tokenizer included")
    algorithm: Literal["grpo", "rloo", "reinforce++"] = Field("grpo", description="The RLVR algorithm")
    lora: LoraSettings | None = Field(LoraSettings(), description="The adapter; null trains all parameters")
    data: DataSettings
    reward: Choice = Field(Choice(name="math-verify"), description="A reward's name, or module:function")
    learning_rate: float = Field(1e-5, gt=0, description="Of the optimizer, before the scheduler")
    lr_scheduler: str = Field("constant", description="As transformers names it")
    prompts_per_step: int = Field(16, ge=1, description="Different prompts in one RL step")
    generations: int = Field(8, ge=2, description="Roll-outs of each prompt")
    temperature: float = Field(1.0, gt=0, description="Roll-outs are sampled at")
    max_new_tokens: int = Field(256, ge=1, description="Longest completion")
    beta: float = Field(0.0, ge=0, description="Weight of the KL divergence from the reference policy")
    evaluation: Literal["likelihood", "generate"] = Field(
        "likelihood",
        description="Accuracy as the exact probability of `answer` and the end token (for tasks with one right "
        "string), or as the reward of greedy completions",
    )


class RunConfig(Frozen):
    """Everything `next-core run` needs. Paths are relative to the config file."""

    steps: int = Field(ge=1, le=MOST_STEPS, description="RL steps in all")
    seed: int = Field(0, ge=0, description="Of the adapter's start, the prompts' order and the samples")
    training: TrainingSettings
    backend: Choice = Field(Choice(name="trl"), description="The trainer")
    predictor: Choice = Field(Choice(name=DEFAULT_PREDICTOR), description="Where the weights are going")
    compressor: Choice | None = Field(
        None, description="How deltas become rank-k factors; none: exact for LoRA, lanczos for full parameters"
    )
    rank: int = Field(1, ge=1, description="Rank k of the factors a predictor reads")
    executor: Executor = Field(Executor(), description="Where matrices are compressed: local, or ray")
    schedule: Schedule = Schedule()
    guards: Guards = Guards()
    control: Literal["plain", "none"] = Field("none", description="Run the same seed and steps without jumps beside it")
    save_every: int | None = Field(
        None,
        ge=1,
        description="Steps between the trainer's own checkpoints, which a run that was ended early goes on from",
    )
    measure_every: int | None = Field(
        None, ge=1, description="Steps between accuracies on the validation and test prompts, for curves"
    )

    @model_validator(mode="before")
    @classmethod
    def _made_for(cls, raw: Any) -> Any:
        """Where the config is silent, schedule and guards are those that the predictor is made for."""
        if not isinstance(raw, Mapping):
            return raw
        chosen = raw.get("predictor", DEFAULT_PREDICTOR)
        name = chosen if isinstance(chosen, str) else chosen.get("name") if isinstance(chosen, Mapping) else None
        if not isinstance(name, str) or name not in registry().names("predictor"):
            return raw  # said elsewhere
        blocks = registry().get("predictor", name).made_for
        if not isinstance(blocks, Mapping) or not all(isinstance(fields, Mapping) for fields in blocks.values()):
            raise PluginError(f"predictor '{name}': made_for must map 'schedule' and 'guards' to their fields")
        given = {key: raw.get(key, {}) for key in blocks}
        return {**raw, **{key: {**blocks[key], **own} for key, own in given.items() if isinstance(own, Mapping)}}

    @model_validator(mode="after")
    def _room_for_jumps(self) -> Self:
        try:
            self.schedule.check(self.steps)
            self.guards.check(self.schedule)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def check_plugins(self) -> None:
        """Raise ``PluginError`` or ``ConfigError`` for a plug-in that is unknown or whose fields are wrong."""
        for kind in ("backend", "predictor", "compressor"):
            choice: Choice | None = getattr(self, kind)
            if choice is None:
                continue
            registry().make_config(kind, choice.name, choice.fields, where=kind)
        self.schedule.check_predictor(self.predictor.make("predictor"), self.steps)
        reward = self.training.reward
        if ":" not in reward.name:
            registry().make_config("reward", reward.name, reward.fields, where="training.reward")


MAX_NODES = 10_000
"""Values of one YAML document; aliases can make a few lines stand for billions."""
MAX_YAML = 2**20
"""Bytes of a YAML file."""
MAX_DEPTH = 100
MAX_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is there twice is an error, and 1e-4 (YAML 1.1's text) is a number."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MAX_DEPTH:  # the scanner looks at every level for every token
            raise yaml.scanner.ScannerError(None, None, f"more than {MAX_DEPTH} brackets deep", self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else 2**64
        if abs(value) >= 2**64:
            raise yaml.constructor.ConstructorError(None, None, "the number does not fit in 64 bits", node.start_mark)
        return value

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed = getattr(self, "_composed", 0) + 1
        if self._composed > MAX_NODES:  # before all of a huge document is read
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_NODES} values")
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _bound(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # <<: *defaults, whose keys yield to those beside it
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _bound(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes a document has with its aliases written out. Raises for more than any config needs."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands within what it names", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = [c for pair in node.value for c in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_bound(child, sizes) for child in children))
    if size > MAX_NODES:
        raise yaml.constructor.ConstructorError(
            None, None, f"more than {MAX_NODES} values once aliases are written out", node.start_mark
        )
    sizes[id(node)] = size
    return size


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """Parse safe YAML. Raises ``ConfigError`` with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML lets some of Python's own through, as for the date 2024-13-01
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def load_yaml(file: Path, keys: str) -> dict[str, Any]:
    """A YAML file that is a mapping; ``keys`` says where its keys are told. Raises ``ConfigError``."""
    try:
        text = read_text(file, MAX_YAML)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    raw = parse_yaml(text, str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must be a mapping of keys, {keys}")
    return raw


def load_config(path: str | Path) -> RunConfig:
    """Read and validate a config file. Raises ``ConfigError`` naming each wrong key, ``PluginError`` for a name."""
    file = Path(path)
    return make_config(load_yaml(file, "see `next-core schema`"), where=str(file), base=file.parent)


def make_config(raw: Mapping[str, Any], where: str = "config", base: Path | None = None) -> RunConfig:
    """Validate a config given as a mapping; relative paths count from ``base``."""
    try:
        config = RunConfig.model_validate(dict(raw))
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
        config.check_plugins()
    except (ConfigError, PluginError) as error:
        raise type(error)("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
    return config


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
