"""The journal: every decision of a run, one JSON object a line, append-only, each with its checksum."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError, describe
from next_core.storage.json_lines import append_json_line, parse_json_line
from next_core.storage.reading import LARGE, read_bytes

JOURNAL = "journal.jsonl"
ENDING = ("end", "advice", "best")  # Events of a run's end, which a resume voids: the run was given more steps
VERDICT = ("jump_step", "accepted", "reason", "accuracy")  # Fields of a record of the event ``verify``


class Journal:
    """The records of one run. Without a path they are kept in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.records = read_journal(path)

    def append(self, event: str, step: int, **facts: Any) -> dict[str, Any]:
        """Write one record durably, and return it."""
        return self._append({"event": event, "step": step, **facts})

    def append_unsynced(self, event: str, step: int, **facts: Any) -> dict[str, Any]:
        """Write one record without waiting for the disk, which takes milliseconds; the next durable one makes it so."""
        return self._append({"event": event, "step": step, **facts}, durable=False)

    def _append(self, record: dict[str, Any], durable: bool = True) -> dict[str, Any]:
        if self.path is not None:
            append_json_line(self.path, record, durable)
        self.records.append(record)
        return record

    def jumps(self) -> list[dict[str, Any]]:
        """Return the attempted jumps that still count, each with its final verdict."""
        return valid_jumps(self.records)

    def counted(self) -> list[dict[str, Any]]:
        """Return all records that still count after resumes."""
        return counted_records(self.records)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read all complete records, without their checksums. An incomplete last line is dropped.

    Raises ``CheckpointError`` naming the line for any other damage.
    """
    try:
        lines = read_bytes(path, LARGE).splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({describe(error)}); restore the file", kind="checkpoint-journal-damaged"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = parse_json_line(line)
            _check(record)
        except ValueError as error:
            raise CheckpointError(
                f"{path}, line {number} is damaged ({error}); restore the file", kind="checkpoint-journal-damaged"
            ) from None
        records.append(record)
    return records


def _check(record: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a record without the fields of its event."""
    required = ("event", "step", *(VERDICT if record.get("event") == "verify" else ()))
    if missing := [key for key in required if key not in record]:
        raise ValueError(f"'{missing[0]}' is missing")
    if not isinstance(record["event"], str) or not isinstance(record["step"], int):
        raise ValueError("'event' must be text and 'step' a number")  # noqa: TRY004 - one kind of error for all damage


def counted_records(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that still count: a resume discards what happened after its step."""
    counted: list[dict[str, Any]] = []
    for record in records:
        if record["event"] == "resume":
            begun = [earlier for earlier in counted if earlier["event"] not in ENDING]
            counted = [earlier for earlier in begun if earlier["step"] <= record["step"]]
        counted.append(dict(record))
    return counted


def valid_jumps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the jump records that still count, in order, with their verdicts."""
    jumps: list[dict[str, Any]] = []
    for record in counted_records(records):
        if record["event"] == "jump":
            jumps.append(record)
        elif record["event"] == "verify":
            for jump in jumps:
                if jump["step"] == record["jump_step"]:
                    jump |= {"accepted": record["accepted"], "reason": record["reason"]}
                    jump["accuracy_recovered"] = record["accuracy"]
    return jumps
