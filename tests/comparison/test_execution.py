"""Whole comparisons with the real trainer: sharing changes nothing, and an interrupted one goes on."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from next_core.comparison import compare, load_comparison
from next_core.comparison.execution import COMPARE
from next_core.comparison.races import make_plan
from next_core.cycle.run import run
from next_core.errors import BackendError, ConfigError

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
    """A comparison that is over, and what it told on the way; tests work on copies of its folder."""

    file: Path
    folder: Path
    told: list[tuple[str, int, int]]

    def copied(self, target: Path) -> Path:
        shutil.copytree(self.folder, target)
        return target


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("comparison")
    file, told = written(folder), list[tuple[str, int, int]]()
    compare(*load_comparison(file), folder / "out", progress=lambda *facts: told.append(facts))
    return Finished(file, folder / "out", told)


def test_races_that_share_a_prefix_end_where_they_would_alone(finished: Finished, tmp_path: Path) -> None:
    config, arms = load_comparison(finished.file)
    assert [trunk.stops for trunk in make_plan(config, arms).trunks] == [(3, 5, 10)]
    by_name = {arm.name: arm.variants[0] for arm in arms}
    for name in ("secant", "longer"):
        run(by_name[name].seeded(3), tmp_path / name)
        assert accuracies(tmp_path / name) == accuracies(finished.folder / "races" / name / "seed-3"), name
    found = json.loads((finished.folder / COMPARE).read_text())
    assert found["arms"]["no jump"]["difference"]["mean"] == 0.0
    assert found["arms"]["secant"]["difference"]["mean"] != 0.0
    assert [jump["step"] for jump in found["arms"]["secant"]["jumps"]["3"]] == [4, 6]
    assert [jump["step"] for jump in found["arms"]["later"]["jumps"]["3"]] == [6]


def test_progress_is_told_and_checkpoints_are_not_kept(finished: Finished) -> None:
    assert ("races", 4, 4) in finished.told
    assert any(what == "later, seed 3" for what, _, _ in finished.told)
    folder = finished.folder / "races" / "secant" / "seed-3"
    names = ["config.yaml", "journal.jsonl", "metrics.jsonl", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in finished.folder.iterdir()) == [COMPARE, "comparison.json", "races"]


def test_what_is_done_is_not_run_again_and_arms_can_be_added(finished: Finished, tmp_path: Path) -> None:
    out = finished.copied(tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    more = {"secant": {}, "later": {"schedule": {"observe": 6}}, "more": {"predictor": {"name": "rl-extra"}}}
    raw = yaml.safe_load(finished.file.read_text())
    finished.file.with_name("more.yaml").write_text(yaml.safe_dump(raw | {"arms": more}, sort_keys=False))
    found = compare(*load_comparison(finished.file.with_name("more.yaml")), out).as_dict()
    assert found["arms"]["more"]["difference"]["mean"] != 0.0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert found["arms"]["secant"] == json.loads((finished.folder / COMPARE).read_text())["arms"]["secant"]


def test_a_race_of_another_config_is_not_mixed_in(finished: Finished) -> None:
    raw = yaml.safe_load(finished.file.read_text())
    raw["run"]["training"]["learning_rate"] = 2e-3
    finished.file.with_name("other.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(ConfigError, match="seed-3 was run with another config"):
        compare(*load_comparison(finished.file.with_name("other.yaml")), finished.folder)


def test_leftovers_of_a_killed_call_are_no_obstacle(finished: Finished, tmp_path: Path, dead: int) -> None:
    out = finished.copied(tmp_path / "out")
    races = out / "races" / "secant"
    (races / "seed-3" / "result.json").unlink()
    (races / "seed-3" / "config.yaml").unlink()  # killed while its trainer was built
    (races / "seed-3" / "trainer").mkdir()
    (races / f".seed-3.tmp-{dead}").mkdir()
    compare(*load_comparison(finished.file), out)
    assert accuracies(races / "seed-3") == accuracies(finished.folder / "races" / "secant" / "seed-3")
    assert sorted(path.name for path in races.iterdir()) == ["seed-3"]


def test_an_interrupted_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path, arms={"secant": {}}, longer=None, controls=[], steps=6))

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == ("races", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, arms, tmp_path / "out", progress=interrupt)
    [made] = (tmp_path / "out").rglob("races/*/*/result.json")
    before = made.stat().st_mtime_ns
    found = compare(config, arms, tmp_path / "out").as_dict()
    assert made.stat().st_mtime_ns == before, "what was done is not run again"
    assert set(found["arms"]) == {"plain", "secant"}


def test_a_race_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "broken_reward.py").write_text("def reward(**kwargs):\n    raise ValueError('no reward today')\n")
    broken = {"training": {"reward": "broken_reward:reward"}}
    config, arms = load_comparison(written(tmp_path, longer=None, controls=[], steps=6, arms={"broken": broken}))
    with pytest.raises(BackendError, match="1 of 2 races failed") as failed:
        compare(config, arms, tmp_path / "out")
    assert "broken, seed 3" in str(failed.value)
    assert "no reward today" in str(failed.value)
    assert (tmp_path / "out" / "races" / "plain" / "seed-3" / "result.json").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="no comparison; choose another --out"):
        compare(config, arms, out)


def test_one_folder_is_compared_in_by_one_process(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    with (tmp_path / ".out.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="out is in use by process"):
            compare(config, arms, tmp_path / "out")
