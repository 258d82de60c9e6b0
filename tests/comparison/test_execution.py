"""Whole comparisons with the real trainer: sharing changes nothing, and an interrupted one resumes."""

import contextlib
import fcntl
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from next_core.comparison import compare, execution, load_comparison
from next_core.comparison.execution import COMPARE
from next_core.comparison.races import make_plan
from next_core.cycle.run import run
from tests.errors import raises_kind

pytestmark = pytest.mark.trl

EXAMPLES = Path(__file__).parents[2] / "examples"


def written(folder: Path, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "base": str(EXAMPLES / "quickstart.yaml"),
        "run": {
            "predictor": {"name": "secant", "window": 2},
            "schedule": {"observe": 4, "every": 2, "horizon": 2, "jump_every": 2, "settle": 2, "alpha": 1},
            "training": {
                "prompts_per_step": 2,
                "generations": 4,
                "learning_rate": 1e-3,
                "data": {
                    "test": str(EXAMPLES / "arithmetic" / "validation.jsonl"),
                    "validation": str(folder / "v.jsonl"),
                },
            },
        },
        "steps": 8,
        "longer": 10,
        "seeds": [3],
        "measure_every": 4,
        "controls": ["no jump"],
        "arms": {"secant": {}, "later": {"schedule": {"observe": 6}}},
    }
    for name, split in (("v", "validation"), ("t", "test")):
        rows = (EXAMPLES / "arithmetic" / f"{split}.jsonl").read_text().splitlines()[:64]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(raw | changes, sort_keys=False))
    return file


def accuracies(folder: Path) -> list[Any]:
    found = json.loads((folder / "result.json").read_text())
    return [(p["step"], p["test"], p["validation"]) for p in found["curve"] if p["step"] % 4 == 0]


@dataclass(frozen=True)
class Finished:
    """A comparison that is finished, and its progress reports; tests work on copies of its folder."""

    file: Path
    folder: Path
    reports: list[tuple[str, int, int]]

    def changed(self, target: Path, **changes: Any) -> Path:
        """Write a copy of its file with other keys."""
        target.write_text(yaml.safe_dump(yaml.safe_load(self.file.read_text()) | changes, sort_keys=False))
        return target


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("comparison")
    file, reports = written(folder), list[tuple[str, int, int]]()
    compare(*load_comparison(file), folder / "out", progress=lambda *report: reports.append(report))
    return Finished(file, folder / "out", reports)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the races in a thread of this process, which has imported the trainer already."""

    @contextlib.contextmanager
    def pool(workers: int) -> Iterator[tuple[Any, Any]]:
        with ThreadPoolExecutor(1) as threads:
            try:
                yield threads, multiprocessing.get_context("spawn").SimpleQueue()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    monkeypatch.setattr(execution, "_pool", pool)


def test_races_that_share_a_prefix_end_where_they_would_alone(finished: Finished, tmp_path: Path) -> None:
    config, arms = load_comparison(finished.file)
    assert [trunk.stops for trunk in make_plan(config, arms).trunks] == [(3, 5)]
    by_name = {arm.name: arm.variants[0] for arm in arms}
    for name in ("secant", "longer"):
        run(by_name[name].seeded(3), tmp_path / name)
        assert accuracies(tmp_path / name) == accuracies(finished.folder / "races" / name / "seed-3"), name
    found = json.loads((finished.folder / COMPARE).read_text())
    assert found["arms"]["no jump"]["difference"]["mean"] == 0.0
    assert found["arms"]["secant"]["difference"]["mean"] != 0.0
    assert [jump["step"] for jump in found["arms"]["secant"]["jumps"]["3"]] == [4, 6]
    assert [jump["step"] for jump in found["arms"]["later"]["jumps"]["3"]] == [6]


def test_progress_is_reported_and_checkpoints_are_not_kept(finished: Finished) -> None:
    assert ("races", 4, 4) in finished.reports
    assert any(what == "later, seed 3" for what, _, _ in finished.reports)
    folder = finished.folder / "races" / "secant" / "seed-3"
    names = ["config.yaml", "journal.jsonl", "metrics.jsonl", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in finished.folder.iterdir()) == [COMPARE, "comparison.json", "races"]


def test_finished_races_are_kept_leftovers_of_a_killed_call_replaced_and_new_arms_run(
    finished: Finished, tmp_path: Path, dead: int, in_this_process: None
) -> None:
    out = Path(shutil.copytree(finished.folder, tmp_path / "out"))
    races = out / "races" / "secant"
    (races / "seed-3" / "result.json").unlink()
    (races / "seed-3" / "config.yaml").unlink()  # killed while its trainer was built
    (races / "seed-3" / "trainer").mkdir()
    (races / f".seed-3.tmp-{dead}").mkdir()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    arms = {"secant": {}, "later": {"schedule": {"observe": 6}}, "more": {"predictor": {"name": "rl-extra"}}}
    found = compare(*load_comparison(finished.changed(finished.file.with_name("more.yaml"), arms=arms)), out).as_dict()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert found["arms"]["more"]["difference"]["mean"] != 0.0
    assert accuracies(races / "seed-3") == accuracies(finished.folder / "races" / "secant" / "seed-3")
    assert sorted(path.name for path in races.iterdir()) == ["seed-3"]


def test_a_race_of_another_config_is_not_mixed_in(finished: Finished) -> None:
    run_keys = yaml.safe_load(finished.file.read_text())["run"]
    run_keys["training"]["learning_rate"] = 2e-3
    other = finished.changed(finished.file.with_name("other.yaml"), run=run_keys)
    with raises_kind("config-other-run", "seed-3"):
        compare(*load_comparison(other), finished.folder)


def test_an_interrupted_comparison_resumes_with_what_is_missing(tmp_path: Path, in_this_process: None) -> None:
    config, arms = load_comparison(written(tmp_path, arms={"secant": {}}, longer=None, controls=[], steps=6))

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == ("races", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, arms, tmp_path / "out", progress=interrupt)
    made = next((tmp_path / "out").rglob("races/*/*/result.json"))
    before = made.stat().st_mtime_ns
    found = compare(config, arms, tmp_path / "out")
    assert made.stat().st_mtime_ns == before, "what was done is not run again"
    assert set(found.arms) == {"plain", "secant"}


def test_a_race_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, in_this_process: None) -> None:
    (tmp_path / "broken_reward.py").write_text("def reward(**kwargs):\n    raise ValueError('no reward today')\n")
    broken = {"training": {"reward": "broken_reward:reward"}}
    config, arms = load_comparison(written(tmp_path, longer=None, controls=[], steps=6, arms={"broken": broken}))
    with raises_kind("backend-failed", "1 of 2", "broken, seed 3", "no reward today"):
        compare(config, arms, tmp_path / "out")
    assert (tmp_path / "out" / "races" / "plain" / "seed-3" / "result.json").exists()


def test_a_folder_of_something_else_or_in_use_is_refused(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    out = tmp_path / "out"
    with (tmp_path / ".out.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with raises_kind("config-folder-in-use", out):
            compare(config, arms, out)
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with raises_kind("config-folder-not-empty", out):
        compare(config, arms, out)
