"""The journal says what happened, also after the run was killed while it wrote."""

from pathlib import Path
from typing import Any

import pytest

from next_core.cycle.journal import Journal, counted_records, read_journal, valid_jumps
from next_core.storage.json_lines import json_line
from tests.errors import raises_kind


def jump(step: int, accepted: bool = True) -> dict[str, Any]:
    return {"event": "jump", "step": step, "accepted": accepted, "reason": "as said"}


def resume(step: Any) -> dict[str, Any]:
    return {"event": "resume", "step": step}


def verify(step: int, jump_step: int, accepted: bool) -> dict[str, Any]:
    facts = {"jump_step": jump_step, "accepted": accepted, "reason": "recovered or not", "accuracy": 0.5}
    return {"event": "verify", "step": step, **facts}


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


TORN = [b'{"event": "ju', b'{"event": "jump"}', b"null", bytes(3), b"\xff", json_line(resume(2))[:-1]]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_dropped_and_the_journal_gone_on_with(tmp_path: Path, torn: bytes) -> None:
    path = write(tmp_path / "journal.jsonl", json_line(resume(1)), torn)
    assert read_journal(path) == [resume(1)]
    Journal(path).append("resume", 3)
    Journal(path).append("resume", 4)
    assert [record["step"] for record in read_journal(path)] == [1, 3, 4]


WITHOUT_CHECKSUM = b'{"event": "resume", "step": 2}'
WRONG_RECORDS = ({"event": "jump"}, {"step": 5}, {"event": 5, "step": 5}, resume("x"))
VERDICT = {"event": "verify", "step": 12, "jump_step": 10, "accepted": True, "reason": "x", "accuracy": 0.5}
LACKING = [{k: v for k, v in VERDICT.items() if k != gone} for gone in ("jump_step", "accepted", "reason", "accuracy")]


@pytest.mark.parametrize("bad", [b"{", b"5", b"", WITHOUT_CHECKSUM, *map(json_line, [*WRONG_RECORDS, *LACKING])])
@pytest.mark.parametrize("more", [(), (json_line(resume(3)),)], ids=["last", "not last"])
def test_damage_in_a_whole_line_names_the_line(tmp_path: Path, bad: bytes, more: tuple[bytes, ...]) -> None:
    path = write(tmp_path / "journal.jsonl", json_line(resume(1)), bad.removesuffix(b"\n") + b"\n", *more)
    with raises_kind("checkpoint-journal-damaged", "journal.jsonl, line 2"):
        Journal(path)


def test_an_empty_journal_has_no_records_and_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert read_journal(write(tmp_path / "journal.jsonl")) == []
    with raises_kind("checkpoint-journal-damaged", tmp_path):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    ("records", "accepted"),
    [
        ([jump(50), jump(60), jump(70), resume(60), jump(70, accepted=False)], [(50, True), (60, True), (70, False)]),
        ([jump(50), jump(60), verify(70, 50, accepted=False)], [(50, False), (60, True)]),
        ([jump(50), verify(70, 50, accepted=False), resume(60)], [(50, True)]),
        ([jump(50), resume(40), jump(50), verify(60, 50, accepted=False)], [(50, False)]),
    ],
    ids=["resumed before a jump", "verified", "resumed before the verdict", "verified after a resume"],
)
def test_jumps_and_verdicts_count_until_a_resume(
    records: list[dict[str, Any]], accepted: list[tuple[int, bool]]
) -> None:
    assert [(j["step"], j["accepted"]) for j in valid_jumps(records)] == accepted


def test_the_end_of_a_run_that_is_given_more_steps_does_not_count() -> None:
    ended = [jump(50), {"event": "advice", "step": 60, "text": "train longer"}, {"event": "end", "step": 60}]
    assert [record["event"] for record in counted_records([*ended, resume(60), jump(70)])] == ["jump", "resume", "jump"]


def test_a_jump_that_was_verified_has_the_facts_of_its_verdict() -> None:
    records = [jump(50), verify(70, 50, accepted=False)]
    [found] = valid_jumps(records)
    assert (found["reason"], found["accuracy_recovered"]) == ("recovered or not", 0.5)
    assert records[0]["accepted"]  # the records themselves stay as they were written
