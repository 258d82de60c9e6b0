"""The config of a comparison: one run, and the arms that differ from it."""

import itertools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, StrictInt, field_validator, model_validator

from next_core.config import absolute_path, located, make_config, recommended_blocks
from next_core.errors import ConfigError, contradiction, invalid_value
from next_core.run_config import DEFAULT_PREDICTOR, RunConfig
from next_core.settings import Settings, validated
from next_core.storage.yaml_files import load_yaml

Role = Literal["plain", "control", "arm"]
Values = Mapping[str, Any]  # Fields of a run config by their dotted keys: `{"schedule.alpha": 2.0}`

PLAIN, LONGER, TUNED, NO_JUMP, RANDOM = "plain", "longer", "tuned", "no jump", "random direction"
OURS = ("steps", "seed", "control", "measure_every")  # Keys of a run that the comparison sets
NAME = re.compile(r"[A-Za-z0-9]([\w ,=+.()-]{0,60}[\w)])?", re.ASCII)
PLUGINS = ("predictor", "backend", "compressor", "reward")
MOST_RACES = 10_000  # Seeds, and variants of one arm: more cannot be run, nor listed


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
        blocks = {"run": self.run} | {f"arms.{name}": arm for name, arm in self.arms.items()}
        wrong = [f"{where}.{key}" for where, block in blocks.items() for key in OURS if key in block]
        if wrong:
            raise ValueError(f"{wrong[0]}: this is set for all arms; see the keys of a comparison")
        return self


@dataclass(frozen=True)
class Variant:
    """One run config of an arm, before its seed; ``values`` distinguish it from the arm's other variants."""

    values: Values
    config: RunConfig

    def seeded(self, seed: int) -> RunConfig:
        return self.config.model_copy(update={"seed": seed})


@dataclass(frozen=True)
class Arm:
    """One competitor: its variants, among which the validation prompts choose."""

    name: str
    role: Role
    variants: tuple[Variant, ...] = field(repr=False)


def load_comparison(path: str | Path) -> tuple[CompareConfig, list[Arm]]:
    """Read a comparison's file and everything it names. Raises ``ConfigError`` and ``PluginError`` as a run does.

    Its folder, and that of its base, go on ``sys.path``: a reward that a config names may be there.
    """
    file = Path(path)
    config = validated(CompareConfig, load_yaml(file, "see docs/compare.md"), str(file))
    base = None if config.base is None else absolute_path(file.parent, config.base, str(file))
    for folder in (file.resolve().parent, *([] if base is None else [base.parent])):
        if folder.is_dir() and str(folder) not in sys.path:  # Python would open a FIFO there and wait
            sys.path.insert(0, str(folder))
    shared: dict[str, Any] = {}
    if base is not None:
        try:
            shared = _absolute(load_yaml(base, "see `next-core schema`"), base.parent, str(base))
        except ConfigError as error:
            raise ConfigError(f"{file}: base: {error.message}", kind=error.kind) from None
    shared = {key: value for key, value in shared.items() if key not in OURS}
    shared = _merged(shared, _absolute(config.run, file.parent.resolve(), str(file)))
    return config, list(_arms(config, shared, file))


def _arms(config: CompareConfig, shared: Values, file: Path) -> Iterator[Arm]:
    common = {**shared, "steps": config.steps, "measure_every": config.measure_every}
    alike, arm = _with_schedule(common), partial(_arm, file=file, metric=config.metric)
    yield arm(PLAIN, "plain", {**alike, "predictor": "stay"})
    if config.longer is not None:
        yield arm(LONGER, "plain", {**alike, "predictor": "stay", "steps": config.longer})
    if config.tuned:
        yield arm(TUNED, "control", {**alike, "predictor": "stay"}, config.tuned)
    if NO_JUMP in config.controls:
        yield arm(NO_JUMP, "control", {**alike, "predictor": {"name": "stay", "jump": True}})
    if RANDOM in config.controls:
        yield arm(RANDOM, "control", {**alike, "predictor": "random"})
    for name, changes in config.arms.items():
        own = _absolute({key: value for key, value in changes.items() if key != "choose"}, file.parent.resolve(), name)
        # A predictor that recommends a schedule replaces the common one.
        replaced = {"predictor", *recommended_blocks(own["predictor"])} if "predictor" in own else set()
        kept = {key: value for key, value in common.items() if key not in replaced}
        yield arm(name, "arm", _merged(kept, own), changes.get("choose", {}))


def _arm(name: str, role: Role, raw: Values, choose: Any = None, *, file: Path, metric: str) -> Arm:
    """Make every variant of an arm. Raises ``ConfigError`` for what cannot be run, judged or chosen."""
    where, variants = f"{file}: {name}", []
    for values in _combinations(choose or {}, where):
        filled: Mapping[str, Any] = raw
        for key, value in values.items():
            filled = _merged(filled, _nested(key.split("."), value), whole=())
        config = make_config(_absolute(filled, file.parent.resolve(), where), where=where)
        variants.append(Variant(values, config))
        training = config.training
        if training.data.test is None and training.data.validation is None:
            raise contradiction(f"{where}: training.data has no test and no validation prompts to judge by")
        if training.evaluation == "generate" and metric != "greedy":
            raise contradiction(f"{where}: training.evaluation: generate is greedy; set metric: greedy")
    data = variants[0].config.training.data
    if len(variants) > 1 and (data.test is None or data.validation is None or data.validation == data.test):
        files = "chosen on training.data.validation and reported on training.data.test"
        raise contradiction(f"{where}: values are {files}; both must be there, and differ")
    return Arm(name, role, tuple(variants))


def _with_schedule(common: Values) -> dict[str, Any]:
    """Return the common keys for other predictors: they keep the schedule that the run's own predictor recommends."""
    recommended = dict(recommended_blocks(common.get("predictor", DEFAULT_PREDICTOR)).get("schedule", {}))
    own = common.get("schedule", {})
    recommended.pop("average", None)  # of that predictor alone, unless the run's own keys say so
    return {**common, "schedule": {**recommended, **own} if isinstance(own, Mapping) else own}


def _combinations(choose: Any, where: str) -> list[dict[str, Any]]:
    """Return every combination of the values to choose among, by dotted key; one without any if there are none."""
    if not isinstance(choose, Mapping):
        raise invalid_value(f"{where}: choose maps keys to lists, e.g. schedule.alpha: [1, 2, 4]")
    for key, values in choose.items():
        head, _, rest = str(key).partition(".")
        if head in OURS:
            raise contradiction(f"{where}: {key} is set for all arms; it cannot be chosen")
        if head in PLUGINS and not rest:
            raise contradiction(f"{where}: choose: {key}: make arms of them, each with its recommended schedule")
        if not isinstance(values, list) or not values or len({repr(value) for value in values}) < len(values):
            raise invalid_value(f"{where}: {key} needs a list of different values to choose among")
    if math.prod(map(len, choose.values())) > MOST_RACES:
        raise invalid_value(f"{where}: more than {MOST_RACES} combinations of values to choose among")
    return [dict(zip(map(str, choose), chosen, strict=True)) for chosen in itertools.product(*choose.values())]


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _merged(below: Values, above: Values, whole: Sequence[str] = PLUGINS) -> dict[str, Any]:
    """Put ``above`` over ``below``, block by block; the blocks named ``whole`` are replaced as a whole."""
    found = dict(below)
    for key, value in above.items():
        old = {"name": found[key]} if isinstance(found.get(key), str) else found.get(key)  # a plug-in's bare name
        blocks = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in whole
        found[key] = _merged(old or {}, value, whole) if blocks else value
    return found


def _absolute(raw: Values, folder: Path, where: str) -> dict[str, Any]:
    """Make paths absolute, so that blocks of several files can be merged. Other shapes are refused later."""
    if not isinstance(raw.get("training"), Mapping):
        return dict(raw)

    def made(value: Any) -> Any:
        return str(located(folder, value, where)) if isinstance(value, str) else value

    training: dict[str, Any] = dict(raw["training"])
    training |= {"model": made(training["model"])} if "model" in training else {}
    data = training.get("data")
    training |= {"data": {key: made(value) for key, value in data.items()}} if isinstance(data, Mapping) else {}
    return {**raw, "training": training}
