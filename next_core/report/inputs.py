"""The files that a report reads: those of a run or of a comparison, validated strictly. Errors name the file."""

import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from next_core.comparison import comparison_results
from next_core.comparison.comparison_results import Accuracies, ArmResult, Number, Part
from next_core.comparison.execution import COMPARE
from next_core.cycle.journal import JOURNAL, counted_records, read_journal, valid_jumps
from next_core.cycle.measurements import CURVE
from next_core.cycle.run import CONFIG
from next_core.cycle.run_result import RESULT
from next_core.cycle.scaling import EVENTS
from next_core.cycle.summary import probed_accuracies
from next_core.errors import CheckpointError, ConfigError
from next_core.settings import explain
from next_core.sources.metrics import METRICS, by_step, read_log
from next_core.storage.reading import LARGE, parse_json, read_bytes
from next_core.storage.yaml_files import MAX_YAML, parse_yaml

CHECKPOINTS = "checkpoints"
MOST_PROBLEMS = 3


class Jump(Part):
    """An attempted jump."""

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

    @property
    def multiple(self) -> float | None:
        """The multiple of the observed update that a predictor such as ``adaptive-secant`` aims at."""
        return self.diagnostics.get("multiple")


class Scale(Part):
    """A change of the learning rate by step scaling, or a return to earlier weights."""

    event: str
    step: int
    accepted: bool = True
    reason: str = ""
    multiple: Number
    rate: Number | None = None
    back_to: int | None = None
    reward: Number | None = None
    best: Number | None = None


class Arm(ArmResult):
    """One way of training, over all seeds."""

    jumps: dict[str, list[Jump]] = {}

    @property
    def jump_log(self) -> list[Jump]:
        return [jump for jumps in self.jumps.values() for jump in jumps]

    @property
    def tries(self) -> bool:
        """Return whether it tries to jump; plain runs only seem to, by a predictor that never does."""
        return any(jump.accepted or self.predictor != "stay" for jump in self.jump_log)


class Comparison(comparison_results.Comparison):
    """``compare.json``."""

    arms: dict[str, Arm] = Field(min_length=1)


class Point(Part):
    """Accuracies after a step, and the seconds of training up to then."""

    step: int
    seconds: Number | None = None
    test: Accuracies = {}


class Control(Part):
    """The plain run of the same seed."""

    steps: int
    seconds: Number | None = None
    accuracy: Accuracies = {}
    curve: list[Point] = []


class Result(Part):
    """``result.json`` of a finished run."""

    steps: int
    seconds: dict[str, Number] = {}
    accuracy: Accuracies = {}
    jumps: list[Jump] = []
    scaling: list[Scale] = []
    control: Control | None = None
    resumed_from: int | None = None
    settings: dict[str, Any] = {}
    date: str = ""
    hardware: str = ""
    versions: dict[str, str] = {}
    notes: list[str] = []
    curve: list[Point] = []


class _Events(Part):
    """The records of a journal that a report reads."""

    jumps: list[Jump]
    scaling: list[Scale]
    points: list[Point]


class Recorded:
    """A run's folder: its journal and, where they exist, its config, result, metrics and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.config = _text(folder / CONFIG)
        self.result = _load(folder / RESULT, Result) if os.path.lexists(folder / RESULT) else None
        journal = folder / JOURNAL
        records = read_journal(journal) if os.path.lexists(journal) else []
        self.events = counted_records(records) or self._from_result()
        self.records = valid_jumps(records)
        """The journal's records of jumps."""
        scaling = [record for record in self.events if record["event"] in EVENTS]
        points = [record for record in self.events if record["event"] == CURVE]
        events = _validated(_Events, {"jumps": self.records, "scaling": scaling, "points": points}, journal)
        self.jumps = events.jumps if records or self.result is None else self.result.jumps
        self.scaling = events.scaling if records or self.result is None else self.result.scaling
        self.curve = events.points if self.result is None else self.result.curve
        self.metrics = dict(sorted(by_step(read_log(folder / METRICS)).items()))

    def _from_result(self) -> list[dict[str, Any]]:
        """Return what a result says of a run whose journal is gone."""
        if self.result is None:
            return []
        last, known = self.result.steps, self.result.accuracy
        start, end = {"step": 0, "value": known.get("start")}, {"step": last, "value": known.get("final")}
        return [{"event": "accuracy"} | start, {"event": "accuracy"} | end, {"event": "end", "step": last}]

    @property
    def predictor(self) -> str:
        """Return the predictor's name, from the result, the journal's last record that has it, or the jumps."""
        known = [record["predictor"] for record in self.events if isinstance(record.get("predictor"), dict)]
        named = known[-1].get("name") if known else None
        named = named if self.result is None else self.result.settings.get("predictor")
        return str(named or next((jump.predictor for jump in self.jumps if jump.predictor), "unknown"))

    @property
    def about(self) -> dict[str, Any]:
        """Return what was trained, and where: from the config and the result, or else as the callback recorded it."""
        recorded, training = self.started.get("about"), self._training
        found = {"seed": self.started.get("seed"), **(recorded if isinstance(recorded, dict) else {})}
        if training is not None:
            data, size = training.get("data"), [training.get(key) for key in ("prompts_per_step", "generations")]
            found |= {key: training.get(key) for key in ("model", "algorithm", "learning_rate")}
            found["task"] = data.get("train") if isinstance(data, dict) else training.get("reward")
            found["rollouts"] = math.prod(size) if all(isinstance(one, int) for one in size) else None
        if self.result is not None:
            known = self.result.settings | {key: getattr(self.result, key) for key in ("date", "hardware", "versions")}
            found |= {key: value for key, value in known.items() if value not in ("", None)}
        return found

    @property
    def title(self) -> str:
        """Return model and task as far as they are known, else the folder's name."""
        return title_of(self.about) or self.folder.resolve().name

    @property
    def rollouts(self) -> int | None:
        """Return how many rollouts an RL step takes, if that is known."""
        known = self.about.get("rollouts")
        return known if isinstance(known, int) and known > 0 else None

    @property
    def probes(self) -> dict[int, float]:
        return probed_accuracies(self.events)

    @property
    def control(self) -> Control | None:
        return None if self.result is None else self.result.control

    @property
    def backbone(self) -> Path | None:
        """Return the base model in the config of a full-parameter run, if it still exists."""
        if self._training is None or self._training.get("lora", "an adapter") is not None:
            return None
        folder = Path(str(self._training.get("model")))
        return folder if folder.is_dir() else None

    @cached_property
    def _training(self) -> dict[str, Any] | None:
        values = parse_yaml(self.config or "", CONFIG)
        training = values.get("training") if isinstance(values, dict) else None
        return training if isinstance(training, dict) else None

    @property
    def started(self) -> dict[str, Any]:
        return next((record for record in self.events if record["event"] == "start"), {})

    @property
    def last_step(self) -> int:
        """Return the last step of the journal or the metrics."""
        steps = [record["step"] for record in self.events if isinstance(record["step"], int)]
        return max([*steps, *self.metrics, 0])


def open_folder(folder: Path) -> Comparison | Recorded:
    """Read a run or a comparison. Raises ``ConfigError`` if there is neither, ``CheckpointError`` if it is damaged."""
    if not folder.is_dir():
        message = f"{folder} is not a folder; name the folder of a run or of a comparison"
        raise ConfigError(message, kind="report-unknown-folder")
    if os.path.lexists(folder / COMPARE):
        return _load(folder / COMPARE, Comparison)
    if _is_run(folder):
        return Recorded(folder)
    near = next((other for other in (folder.parent, folder / "next-core") if _is_run(other)), None)
    hint = "" if near is None else f"; did you mean {near}?"
    raise ConfigError(
        f"{folder} holds neither a run (no {JOURNAL} or {RESULT}) nor a comparison (no {COMPARE}); name the --out "
        f"folder of `next-core run` or `next-core compare`, or the folder of the TRL callback{hint}",
        kind="report-unknown-folder",
    )


def title_of(about: Mapping[str, Any]) -> str:
    """Return model and task as far as they are known."""
    return " on ".join(filter(None, (_short_name(about.get(key)) for key in ("model", "task"))))


def _short_name(value: Any) -> str:
    """Return ``owner/name`` for a Hub id or ``task/base`` for a path; of a data file ``task/train.jsonl`` the task."""
    if not isinstance(value, str):
        return ""
    path = PurePath(value)
    if path.suffix in (".jsonl", ".json", ".parquet", ".csv"):
        return path.parent.name or path.stem
    return "/".join(path.parts[-2:])


def _is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (JOURNAL, RESULT))


T = TypeVar("T", bound=BaseModel)


def _load(path: Path, model: type[T]) -> T:
    try:
        value = parse_json(read_bytes(path, LARGE), finite=False)  # the model names the number that is not finite
    except (OSError, ValueError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from None
    return _validated(model, value, path)


def _validated(model: type[T], value: Any, path: Path) -> T:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = explain(error, path.name, model).splitlines()
        more = f" (and {len(lines) - MOST_PROBLEMS} more)" if len(lines) > MOST_PROBLEMS else ""
        raise _damaged(path, "; ".join(lines[:MOST_PROBLEMS]) + more) from None


def _damaged(path: Path, problem: str) -> CheckpointError:
    more = {COMPARE: ", or run the comparison again", RESULT: ", or remove it: the journal has most of its content"}
    kind = "checkpoint-journal-damaged" if path.name == JOURNAL else "report-damaged-file"
    return CheckpointError(f"{path} is damaged: {problem}; restore it{more.get(path.name, '')}", kind=kind)


def _text(path: Path) -> str | None:
    try:
        return read_bytes(path, MAX_YAML).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it", kind="config-missing-file") from None
