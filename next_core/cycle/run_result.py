"""What a run did, as it is kept in its folder."""

from __future__ import annotations

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
    """What a run did. Accuracies are of the test prompts; ``before_jump`` and ``after_jump`` of the first jump made.

    ``average``: what came of the mean at the end, with ``before_average`` beside the accuracies; None where none was
    asked for.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    steps: int
    seconds: dict[str, float]
    accuracy: dict[str, float | None]
    jumps: list[dict[str, Any]]
    folder: str
    control: dict[str, Any] | None = None
    resumed_from: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    average: dict[str, Any] | None = None
    advice: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    """With ``measure_every``: step, seconds of training so far (measuring left out), accuracies by split and kind."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


_RESULT = TypeAdapter(RunResult)


def read_result(out: Path) -> RunResult:
    """The result of a finished run. Raises ``CheckpointError`` for a damaged one."""
    try:
        return _RESULT.validate_python(parse_json(read_bytes(out / RESULT, LARGE)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{out / RESULT} is damaged ({describe(error)}); remove it, and the same command makes it again"
        ) from None
