"""The config of a comparison: one run, and the arms that differ from it."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, StrictInt, ValidationError, field_validator, model_validator

from next_core.config import absolute_path, make_config, recommended_blocks
from next_core.errors import ConfigError
from next_core.run_config import DEFAULT_PREDICTOR, RunConfig
from next_core.settings import Settings, explain
from next_core.storage.yaml_files import load_yaml

Role = Literal["plain", "control", "arm"]
Values = Mapping[str, Any]
"""Fields of a run config by their dotted keys: ``{"schedule.alpha": 2.0}``."""

PLAIN, LONGER, TUNED, NO_JUMP, RANDOM = "plain", "longer", "tuned", "no jump", "random direction"
OURS = ("steps", "seed", "control", "measure_every")
"""Keys of a run that the comparison sets."""
NAME = re.compile(r"[A-Za-z0-9]([\w ,=+.()-]{0,60}[\w)])?", re.ASCII)
PLUGINS = ("predictor", "backend", "compressor", "reward")
MOST_RACES = 10_000
"""Seeds, and variants of one arm: more cannot be run, nor listed."""


class CompareConfig(Settings):
    """What ``next-core compare`` runs. Paths are relative to the file that names them."""

    base: Path | None = Field(None, description="A run's config file, which `run` changes")
    run: dict[str, Any] = Field(default_factory=dict, description="Keys of the run config that all arms have")
    steps: int = Field(ge=1, description="RL steps of every arm")
    longer: int | None = Field(None, ge=1, description="RL steps of the longer plain run; without it there is none")
    seeds: list[StrictInt] = Field(description="A number of seeds, or a list of them; every arm runs with each")
    metric: Literal["sampled", "greedy"] = Field("sampled", description="The accuracy that decides")
    measure_every: int = Field(25, ge=1, description="Steps between the points of a curve")
    tuned: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Values that the tuned plain run chooses among, e.g. training.learning_rate: [3e-4, 1e-3]",
    )
    controls: list[Literal["no jump", "random direction"]] = Field(
        ["no jump", "random direction"], description="Jumps of length zero, and of random direction, as `run` schedules"
    )
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="By name what differs from `run`; `choose` maps keys to the values that validation chooses among",
    )

    @field_validator("seeds", mode="before")
    @classmethod
    def _so_many(cls, value: Any) -> Any:
        if type(value) is int and value > MOST_RACES:
            raise ValueError(f"at most {MOST_RACES}")
        return list(range(value)) if type(value) is int else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds: at least one, each once, none below 0")
        if self.longer is not None and self.longer <= self.steps:
            raise ValueError(f"longer ({self.longer}) must be more than steps ({self.steps})")
        taken = {PLAIN, LONGER, TUNED, NO_JUMP, RANDOM}
        for name in self.arms:
            if not NAME.fullmatch(name):
                raise ValueError(f"arms: {name!r} cannot name a folder; use letters, digits, spaces and ,-+=._()")
            if name.casefold() in taken:
                raise ValueError(f"arms: {name} is the name of a control, or of another arm; choose another")
            taken.add(name.casefold())
        for block, where in [(self.run, "run"), *((arm, f"arms.{name}") for name, arm in self.arms.items())]:
            for key in OURS:
                if key in block:
                    raise ValueError(f"{where}.{key}: this is set for all arms; see the keys of a comparison")
        return self


@dataclass(frozen=True)
class Variant:
    """One run config of an arm, before its seed; ``values`` is what tells it from the arm's other variants."""

    values: Values
    config: RunConfig

    def seeded(self, seed: int) -> RunConfig:
        """The run of one seed."""
        return self.config.model_copy(update={"seed": seed})


@dataclass(frozen=True)
class Arm:
    """One competitor: its variants, among which the validation prompts choose."""

    name: str
    role: Role
    variants: tuple[Variant, ...] = field(repr=False)


def load_comparison(path: str | Path) -> tuple[CompareConfig, list[Arm]]:
    """Read a comparison's file and everything it names. Raises ``ConfigError`` and ``PluginError`` as a run does."""
    file = Path(path)
    raw = load_yaml(file, "see docs/compare.md")
    try:
        config = CompareConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, str(file), CompareConfig)) from None
    shared: dict[str, Any] = {}
    for folder in _folders(config, file):
        if folder.is_dir() and str(folder) not in sys.path:  # Python would open a FIFO there and wait
            sys.path.insert(0, str(folder))  # a reward that a config names may lie beside it
    if config.base is not None:
        base = absolute_path(file.parent, config.base, str(file))
        try:
            shared = _absolute(load_yaml(base, "see `next-core schema`"), base.parent, str(base))
        except ConfigError as error:
            raise ConfigError(f"{file}: base: {error}") from None
    shared = {key: value for key, value in shared.items() if key not in OURS}
    shared = _merged(shared, _absolute(config.run, file.parent.resolve(), str(file)))
    return config, list(_arms(config, shared, file))


def _folders(config: CompareConfig, file: Path) -> list[Path]:
    folders = [file.resolve().parent]
    return folders if config.base is None else [*folders, absolute_path(file.parent, config.base, str(file)).parent]


def _arms(config: CompareConfig, shared: Mapping[str, Any], file: Path) -> Iterator[Arm]:
    common = {**shared, "steps": config.steps, "measure_every": config.measure_every}
    alike = _controls(common)
    stay = {"predictor": "stay"}

    def arm(name: str, role: Role, raw: Mapping[str, Any], choose: Mapping[str, list[Any]]) -> Arm:
        where, variants = f"{file}: {name}", []
        for values in _products(choose, where):
            filled = dict(raw)
            for key, value in values.items():
                filled = _with(filled, key, value)
            filled = _absolute(filled, file.parent.resolve(), where)
            variants.append(Variant(values, _judgeable(make_config(filled, where=where), config.metric, where)))
        data = variants[0].config.training.data
        if len(variants) > 1 and (data.test is None or data.validation is None or data.validation == data.test):
            raise ConfigError(
                f"{where}: values are chosen on training.data.validation, and what is chosen is reported on "
                "training.data.test; both must be there, and differ"
            )
        return Arm(name, role, tuple(variants))

    yield arm(PLAIN, "plain", {**alike, **stay}, {})
    if config.longer is not None:
        yield arm(LONGER, "plain", {**alike, **stay, "steps": config.longer}, {})
    if config.tuned:
        yield arm(TUNED, "control", {**alike, **stay}, config.tuned)
    if NO_JUMP in config.controls:
        yield arm(NO_JUMP, "control", {**alike, "predictor": {"name": "stay", "jump": True}}, {})
    if RANDOM in config.controls:
        yield arm(RANDOM, "control", {**alike, "predictor": "random"}, {})
    for name, changes in config.arms.items():
        changed = {key: value for key, value in changes.items() if key != "choose"}
        own = _absolute(changed, file.parent.resolve(), f"{file}: arms.{name}")
        choose = changes.get("choose", {})
        if not isinstance(choose, dict) or not all(isinstance(v, list) and v for v in choose.values()):
            raise ConfigError(f"{file}: arms.{name}.choose maps keys to lists, e.g. schedule.alpha: [1, 2, 4]")
        yield arm(name, "arm", _of_arm(common, own), choose)


def _judgeable(config: RunConfig, metric: str, where: str) -> RunConfig:
    """Raise ``ConfigError`` where the accuracy that decides is never measured."""
    if config.training.data.test is None and config.training.data.validation is None:
        raise ConfigError(f"{where}: training.data has no test and no validation prompts to judge by")
    if config.training.evaluation == "generate" and metric != "greedy":
        raise ConfigError(f"{where}: training.evaluation: generate is greedy; set metric: greedy")
    return config


def _controls(common: Mapping[str, Any]) -> dict[str, Any]:
    """The common keys for what has another predictor: the schedule is still the one that the run's is made for."""
    recommended = dict(recommended_blocks(common.get("predictor", DEFAULT_PREDICTOR)).get("schedule", {}))
    own = common.get("schedule", {})
    recommended.pop("average", None)  # of that predictor alone, unless the run's own keys say so
    return {**common, "schedule": {**recommended, **own} if isinstance(own, Mapping) else own}


def _of_arm(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's keys over the common ones; a predictor that is made for a schedule does not take the common one."""
    if "predictor" in own:
        replaced = {"predictor", *recommended_blocks(own["predictor"])}
        common = {key: value for key, value in common.items() if key not in replaced}
    return _merged(common, own)


def _products(choose: Mapping[str, list[Any]], where: str) -> Iterator[dict[str, Any]]:
    for key, values in choose.items():
        if not isinstance(values, list) or not values or len({repr(value) for value in values}) < len(values):
            raise ConfigError(f"{where}: {key} needs a list of different values to choose among")
    if math.prod(map(len, choose.values())) > MOST_RACES:
        raise ConfigError(f"{where}: more than {MOST_RACES} combinations of values to choose among")
    for chosen in itertools.product(*choose.values()):
        yield dict(zip(choose, chosen, strict=True))


def _with(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    if head in OURS:
        raise ConfigError(f"{key} is set for all arms; it cannot be chosen")
    if head in PLUGINS and not rest:
        raise ConfigError(f"choose: {key}: make arms of them, each with the schedule it is made for")
    if not rest:
        return {**raw, head: value}
    block = raw.get(head, {})
    block = {"name": block} if isinstance(block, str) else block
    if not isinstance(block, Mapping):
        raise ConfigError(f"{key}: '{head}' is no block of keys")
    return {**raw, head: _with_inner(block, rest, value)}


def _with_inner(block: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    inner = block.get(head, {})
    return {**block, head: _with_inner(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, block by block; a plug-in's block is replaced as a whole."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        blocks = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in PLUGINS
        found[key] = _merged(old or {}, value) if blocks else value
    return found


def _absolute(raw: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Paths made absolute, so that blocks of several files can be merged. What has no such shape is refused later."""
    if not isinstance(raw.get("training"), Mapping):
        return dict(raw)

    def made(value: Any) -> Any:
        return str(absolute_path(folder, value, where)) if isinstance(value, str) else value

    training: dict[str, Any] = dict(raw["training"])
    training |= {"model": made(training["model"])} if "model" in training else {}
    data = training.get("data")
    training |= {"data": {key: made(value) for key, value in data.items()}} if isinstance(data, Mapping) else {}
    return {**raw, "training": training}
