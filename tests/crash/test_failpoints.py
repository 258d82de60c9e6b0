"""A process that is killed before, within or after any write of ours, and the same command again."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.crash.conftest import Whole
from tests.crash.reader import damages
from tests.crash.work import Point

pytestmark = pytest.mark.trl

TELLING = [
    Point("before renaming", "run/config.yaml", 1),
    Point("before renaming a folder", "run/checkpoints/step-000006", 1),
    Point("after making a folder", "run/jumps/0002", 1),
    Point("within appending to", "run/journal.jsonl", 20),
    Point("before renaming", "run/trainer/checkpoint-9/manifest.json", 1),
    Point("before renaming", "run/result.json", 1),
]
DELETING = [Point("before renaming", "run/checkpoints/deleted.json", 1), Point("after removing", "run/jumps/0001", 1)]
BEFORE_ANYTHING_IS_SAVED = Point("within appending to", "run/journal.jsonl", 3)
PAST_MUCH_THAT_IS_FORGOTTEN = Point("before renaming", "run/trainer/checkpoint-12/manifest.json", 1)
BETWEEN_TWO_RENAMES = Point("between two renames", "run", 1)


def killed_and_begun_again(whole: Whole, points: Sequence[Point], out: Path) -> None:
    """Killed at the first point, begun again and killed at the second, and so on; then begun once more."""
    for point in points:
        outcome = whole.go(out, point)
        assert outcome.killed, f"it was not killed at {point}: {outcome}"
        assert damages(out) == [], f"after kills at {points}"
    whole.ends(out)


def chosen(points: Iterable[Point]) -> list[Point]:
    """The first, the middle and the last point of each kind."""
    kinds: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        kinds.setdefault(point.kind, []).append(point)
    return [same[i] for same in kinds.values() for i in sorted({0, len(same) // 2, len(same) - 1})]


def test_the_run_that_is_killed_jumps_rolls_back_and_ends_at_a_mean(whole_run: Whole) -> None:
    verdicts = {name: record for name, record in whole_run.facts.items() if name.split()[-2:-1] == ["verify"]}
    assert [record["accepted"] for record in verdicts.values()] == ["True", "False"]
    assert next(r for name, r in whole_run.facts.items() if " average " in name)["accepted"] == "True"
    assert {"run/jumps/0002/undone.json", "run/trainer/checkpoint-9/manifest.json"} <= {
        point.path for point in whole_run.points
    }


def test_the_run_that_scales_its_steps_starts_again_once(whole_scaling: Whole) -> None:
    scales = [record for name, record in whole_scaling.facts.items() if name.split()[-2:-1] == ["scale"]]
    assert len(scales) == 7
    assert [record["back_to"] for record in scales if "back_to" in record] == ["0"]
    assert "trainer/checkpoint-9/next-core.safetensors" in whole_scaling.facts


@pytest.mark.parametrize("point", TELLING, ids=lambda point: f"{point.what} {point.path}".replace(" ", "-"))
def test_a_run_killed_at_a_write_goes_on_to_the_same_end(whole_run: Whole, point: Point, tmp_path: Path) -> None:
    killed_and_begun_again(whole_run, [point], tmp_path / "run")


@pytest.mark.parametrize("point", DELETING, ids=lambda point: f"{point.what} {point.path}".replace(" ", "-"))
def test_a_run_killed_while_it_deletes_ends_the_same(whole_needed: Whole, point: Point, tmp_path: Path) -> None:
    killed_and_begun_again(whole_needed, [point], tmp_path / "run")


@pytest.mark.crash
@pytest.mark.parametrize("way", ["run", "callback", "scaling", "needed"])
def test_killed_at_every_kind_of_write_a_run_ends_the_same(
    way: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Whole = request.getfixturevalue(f"whole_{way}")
    points = chosen(whole.points)
    if way != "run":  # their writes are those of the run
        points = list({point.kind: point for point in points}.values())
    with capsys.disabled():
        print(f"\n{way}: {len(whole.points)} failpoints passed, killed at {len(points)} of them")
    for number, point in enumerate(points):
        killed_and_begun_again(whole, [point], tmp_path / str(number) / "run")


@pytest.mark.crash
@pytest.mark.parametrize(
    "before",
    [[BEFORE_ANYTHING_IS_SAVED], [PAST_MUCH_THAT_IS_FORGOTTEN], [BEFORE_ANYTHING_IS_SAVED, BETWEEN_TWO_RENAMES]],
    ids=["it starts again", "it goes on", "what was put aside is put back"],
)
def test_killed_at_the_writes_of_a_process_that_goes_on_a_run_ends_the_same(
    before: list[Point], whole_run: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recorded" / "run"
    for point in before:
        assert whole_run.go(out, point).killed
    passed = whole_run.go(out).value.points
    known = {point.kind for point in whole_run.points}
    points = [point for point in chosen(passed) if point.kind not in known]
    assert points
    with capsys.disabled():
        print(f"\nafter {before}: killed at {points}")
    for number, point in enumerate(points):
        killed_and_begun_again(whole_run, [*before, point], tmp_path / str(number) / "run")
