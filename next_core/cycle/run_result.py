"""The result of a run, and its file."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from next_core.errors import CheckpointError, describe
from next_core.storage.reading import LARGE, parse_json, read_bytes

RESULT = "result.json"


@dataclass
class RunResult:
    """The result of a run.

    Accuracies are on the test prompts; ``before_jump`` and ``after_jump`` are those around the first jump.
    ``scaling`` holds the journal's records of step scaling. ``average`` is the journal's record of the mean at the end,
    or None where none was asked for; ``accuracy`` then has ``before_average`` too.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    steps: int
    seconds: dict[str, float]
    accuracy: dict[str, float | None]
    jumps: list[dict[str, Any]]
    folder: str
    scaling: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, Any] | None = None
    resumed_from: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    """On which the run ended, as 2026-11-30."""
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    average: dict[str, Any] | None = None
    advice: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    """With ``measure_every``: step, seconds of training so far (without measuring), accuracies by split and kind."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


_RESULT = TypeAdapter(RunResult)


def read_result(out: Path) -> RunResult:
    """Read the result of a finished run. Raises ``CheckpointError`` for a damaged one."""
    try:
        return _RESULT.validate_python(parse_json(read_bytes(out / RESULT, LARGE)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{out / RESULT} is damaged ({describe(error)}); remove it, and the same command writes it again",
            kind="checkpoint-damaged",
        ) from None
