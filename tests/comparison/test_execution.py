"""Whole comparisons with the real trainer: sharing changes nothing, and an interrupted one goes on."""

from __future__ import annotations

import fcntl
import json
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


def test_races_that_share_a_prefix_end_where_they_would_alone_and_a_second_call_runs_nothing(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    plan = make_plan(config, arms)
    assert [trunk.stops for trunk in plan.trunks] == [(3, 5, 10)]
    told: list[tuple[str, int, int]] = []
    found = compare(config, arms, tmp_path / "out", progress=lambda *facts: told.append(facts)).as_dict()
    assert ("races", 4, 4) in told
    assert any(what == "later, seed 3" for what, _, _ in told)
    by_name = {arm.name: arm.variants[0] for arm in arms}
    for name, race in (("secant", "secant"), ("later", "later"), ("longer", "longer")):
        run(by_name[name].seeded(3), tmp_path / name)
        alone, shared = accuracies(tmp_path / name), accuracies(tmp_path / "out" / "races" / race / "seed-3")
        assert alone == shared, name
    assert found["arms"]["no jump"]["difference"]["mean"] == 0.0
    assert found["arms"]["secant"]["difference"]["mean"] != 0.0
    assert [jump["step"] for jump in found["arms"]["secant"]["jumps"]["3"]] == [4, 6]
    assert [jump["step"] for jump in found["arms"]["later"]["jumps"]["3"]] == [6]
    folder = tmp_path / "out" / "races" / "secant" / "seed-3"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "journal.jsonl",
        "metrics.jsonl",
        "result.json",
    ]
    assert not (tmp_path / "out" / "trunks").exists()
    before = (tmp_path / "out" / COMPARE).read_text()
    again = compare(config, arms, tmp_path / "out").as_dict()
    assert again["arms"] == json.loads(before)["arms"]


def test_an_interrupted_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == ("races", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, arms, tmp_path / "out", progress=interrupt)
    results = list((tmp_path / "out").rglob("races/*/*/result.json"))
    assert 2 <= len(results) < 4
    stamps = {path: path.stat().st_mtime_ns for path in results}
    found = compare(config, arms, tmp_path / "out").as_dict()
    assert {path: path.stat().st_mtime_ns for path in results} == stamps, "what was done is not run again"
    assert set(found["arms"]) == {"plain", "longer", "no jump", "secant", "later"}


def test_a_race_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("def reward(**kwargs):\n    raise ValueError('no reward today')\n")
    file = written(
        tmp_path,
        longer=None,
        controls=[],
        arms={"broken": {"training": {"reward": "broken_reward:reward"}}, "secant": {}},
    )
    config, arms = load_comparison(file)
    with pytest.raises(BackendError, match="1 of 3 races failed") as failed:
        compare(config, arms, tmp_path / "out")
    assert "broken, seed 3" in str(failed.value)
    assert "no reward today" in str(failed.value)
    assert (tmp_path / "out" / "races" / "secant" / "seed-3" / "result.json").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="no comparison; choose another --out"):
        compare(config, arms, out)


def test_seeds_and_arms_can_be_added_but_a_race_of_another_config_is_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {"longer": None, "controls": [], "steps": 6}
    compare(*load_comparison(written(tmp_path, arms={}, **small)), out)
    made = out / "races" / "plain" / "seed-3" / "result.json"
    before = made.stat().st_mtime_ns
    found = compare(*load_comparison(written(tmp_path, arms={"secant": {}}, **small)), out).as_dict()
    assert set(found["arms"]) == {"plain", "secant"}
    assert made.stat().st_mtime_ns == before
    other = {"training": {"learning_rate": 2e-3}, "schedule": {"observe": 4, "every": 2, "horizon": 2}}
    with pytest.raises(ConfigError, match="seed-3 was run with another config"):
        compare(*load_comparison(written(tmp_path, arms={}, run=other, **small)), out)


def test_one_folder_is_compared_in_by_one_process(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    with (tmp_path / ".out.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is comparing"):
            compare(config, arms, tmp_path / "out")


def test_leftovers_of_a_killed_call_are_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config, arms = load_comparison(written(tmp_path, arms={}, longer=None, controls=[], steps=6))
    compare(config, arms, out)
    plain = out / "races" / "plain" / "seed-3"
    (plain / "result.json").unlink()
    (plain / "config.yaml").unlink()  # killed while its trainer was built
    (plain / "trainer").mkdir()
    (plain.parent / ".seed-3.tmp").mkdir()
    found = compare(config, arms, out).as_dict()
    assert found["arms"]["plain"]["test"]["sampled"]["mean"] > 0
    assert sorted(path.name for path in plain.parent.iterdir()) == ["seed-3"]
