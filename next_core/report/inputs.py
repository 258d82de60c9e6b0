"""What a report is made from: the files of a run or of a comparison, read strictly. Damage names the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, ValidationError, model_validator

from next_core.comparison.execution import COMPARE
from next_core.cycle.journal import JOURNAL, counted_records, read_journal, valid_jumps
from next_core.cycle.run import CONFIG, CURVE
from next_core.cycle.run_result import RESULT
from next_core.errors import CheckpointError, ConfigError
from next_core.settings import explain
from next_core.sources.metrics import METRICS, by_step, read_log
from next_core.storage.reading import LARGE, parse_json, read_bytes
from next_core.storage.yaml_files import MAX_YAML, parse_yaml

CHECKPOINTS = "checkpoints"
MOST_PROBLEMS = 3
Number = Annotated[float, AllowInfNan(False)]
Accuracies = dict[str, Number | None]
"""By the way of answering: sampled, greedy."""


class Part(BaseModel):
    """A part of a file; what is not known is left alone, so that newer files can be read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Interval(Part):
    """A mean over seeds with its 95% interval, which one seed does not have, and each seed's value."""

    mean: Number
    low: Number | None = None
    high: Number | None = None
    values: dict[str, Number | None] = {}


class Jump(Part):
    """A jump that was tried."""

    step: int
    accepted: bool
    reason: str = ""
    norm_ratio: Number | None = None
    alpha: Number | None = None
    predictor: str | None = None
    diagnostics: dict[str, Number | None] = {}
    accuracy_before: Number | None = None
    accuracy_after: Number | None = None
    accuracy_recovered: Number | None = None


class Line(Part):
    """A mean at each step of a curve, with its interval."""

    mean: list[Number | None]
    low: list[Number | None] | None = None
    high: list[Number | None] | None = None


class Curve(Part):
    """Accuracies along a run, by the way of answering."""

    steps: list[int]
    seconds: list[Number | None]
    test: dict[str, Line] = {}
    validation: dict[str, Line] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        count = len(self.steps)
        lines = [*self.test.values(), *self.validation.values()]
        columns = [self.seconds, *(column for line in lines for column in (line.mean, line.low, line.high))]
        if any(column is not None and len(column) != count for column in columns):
            raise ValueError(f"not every column has the {count} points that steps has")
        return self


class Variant(Part):
    """One of the settings among which was chosen on the validation prompts."""

    values: dict[str, Any]
    validation: Interval | None = None
    test: Interval | None = None
    chosen: bool = False


class Arm(Part):
    """One way of training, over all seeds."""

    role: Literal["plain", "control", "arm"]
    predictor: str
    chosen: dict[str, Any] = {}
    variants: list[Variant] = []
    steps: int
    spent_steps: int | None = None
    test: dict[str, Interval | None] = {}
    validation: dict[str, Interval | None] = {}
    difference: Interval | None = None
    difference_longer: Interval | None = None
    equals_step: Interval | None = None
    beyond: int = 0
    steps_saved: Interval | None = None
    icer: Interval | None = None
    seconds: Interval | None = None
    seconds_saved: Interval | None = None
    ours_seconds: Interval | None = None
    curve: Curve | None = None
    jumps: dict[str, list[Jump]] = {}

    @property
    def jump_log(self) -> list[Jump]:
        """The jumps of all seeds."""
        return [jump for jumps in self.jumps.values() for jump in jumps]


class Comparison(Part):
    """``compare.json``."""

    versions: dict[str, str] = {}
    hardware: str = ""
    config: dict[str, Any] = {}
    steps: int
    longer: int | None = None
    seeds: list[int]
    metric: str
    rollouts_per_step: int | None = None
    base: dict[str, Accuracies] = {}
    steps_run: int | None = None
    steps_shared: int | None = None
    arms: dict[str, Arm] = Field(min_length=1)


class Point(Part):
    """Accuracies after a step, and the seconds of training until then."""

    step: int
    seconds: Number | None = None
    validation: Accuracies = {}
    test: Accuracies = {}


class Control(Part):
    """The plain run of the same seed."""

    steps: int
    seconds: Number | None = None
    accuracy: Accuracies = {}
    curve: list[Point] = []


class Result(Part):
    """``result.json`` of a run that ended."""

    steps: int
    seconds: dict[str, Number] = {}
    accuracy: Accuracies = {}
    jumps: list[Jump] = []
    control: Control | None = None
    resumed_from: int | None = None
    settings: dict[str, Any] = {}
    hardware: str = ""
    versions: dict[str, str] = {}
    notes: list[str] = []
    curve: list[Point] = []


class Verdict(Part):
    """What became of a jump some steps later."""

    jump_step: int
    accepted: bool
    reason: str
    accuracy: Number | None


class _Jumps(Part):
    jumps: list[Jump]


class _Verdicts(Part):
    verdicts: list[Verdict]


class _Points(Part):
    points: list[Point]


class Recorded:
    """A run's folder: ``journal.jsonl``, and what else is there of config, result, metrics and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.config = _text(folder / CONFIG)
        self.result = _load(folder / RESULT, Result) if os.path.lexists(folder / RESULT) else None
        journal = folder / JOURNAL
        records = read_journal(journal) if os.path.lexists(journal) else []
        verdicts = [record for record in records if record["event"] == "verify"]
        _validated(_Verdicts, {"verdicts": verdicts}, journal)
        self.events = counted_records(records)
        self.records = valid_jumps(records)
        """The jumps as the journal has them."""
        known = {"jumps": self.records}
        self.jumps = _validated(_Jumps, known, journal).jumps if records or self.result is None else self.result.jumps
        points = [record for record in self.events if record["event"] == CURVE]
        measured = _validated(_Points, {"points": points}, journal).points
        self.curve = measured if self.result is None else self.result.curve
        self.metrics = dict(sorted(by_step(read_log(folder / METRICS)).items()))

    @property
    def predictor(self) -> str:
        """By the result, or else by the jumps."""
        named = None if self.result is None else self.result.settings.get("predictor")
        return str(named or next((jump.predictor for jump in self.jumps if jump.predictor), "unknown"))

    @property
    def backbone(self) -> Path | None:
        """The base model that the config of a full-parameter run names, where it is still there."""
        values = parse_yaml(self.config or "", CONFIG)
        training = values.get("training") if isinstance(values, dict) else None
        if not isinstance(training, dict) or training.get("lora", "an adapter") is not None:
            return None
        folder = Path(str(training.get("model")))
        return folder if folder.is_dir() else None

    @property
    def started(self) -> dict[str, Any]:
        """The facts of the journal's first record."""
        return next((record for record in self.events if record["event"] == "start"), {})

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        steps = [record["step"] for record in self.events if isinstance(record["step"], int)]
        return max([*steps, *self.metrics, 0])

    def accuracy(self, milestone: str) -> float | None:
        """On the test prompts, at the start, around the first jump, or at the end."""
        if self.result is not None:
            return self.result.accuracy.get(milestone)
        found = [r for r in self.events if r["event"] == "accuracy" and r.get("milestone") == milestone]
        value = found[-1].get("value") if found else None
        return float(value) if isinstance(value, int | float) else None


def open_folder(folder: Path) -> Comparison | Recorded:
    """What lies in a folder. Raises ``ConfigError`` where it is neither, ``CheckpointError`` where it is damaged."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; name the folder of a run, or of a comparison")
    if os.path.lexists(folder / COMPARE):
        return _load(folder / COMPARE, Comparison)
    if _is_run(folder):
        return Recorded(folder)
    near = (other for other in (folder.parent, folder / "next-core") if _is_run(other))
    right = next(near, None)
    hint = "" if right is None else f"; did you mean {right}?"
    raise ConfigError(
        f"{folder} is neither a run (no {JOURNAL} or {RESULT}) nor a comparison (no {COMPARE}); name the --out "
        f"folder of `next-core run` or `next-core compare`, or the folder of the TRL callback{hint}"
    )


def _is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (JOURNAL, RESULT))


T = TypeVar("T", bound=BaseModel)


def _load(path: Path, model: type[T]) -> T:
    try:
        value = parse_json(read_bytes(path, LARGE), finite=False)  # the model says which is not
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_remedy(path)}") from None
    return _validated(model, value, path)


def _validated(model: type[T], value: Any, path: Path) -> T:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = explain(error, path.name, model).splitlines()
        more = f"\nand {len(lines) - MOST_PROBLEMS} more" if len(lines) > MOST_PROBLEMS else ""
        told = "\n".join(lines[:MOST_PROBLEMS])
        raise CheckpointError(f"{path} is damaged; {_remedy(path)}\n{told}{more}") from None


def _remedy(path: Path) -> str:
    if path.name == COMPARE:
        return "restore it, or compare again"
    if path.name == RESULT:
        return "restore it, or remove it: the journal has most of what it says"
    return "restore it"


def _text(path: Path) -> str | None:
    try:
        return read_bytes(path, MAX_YAML).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it") from None
