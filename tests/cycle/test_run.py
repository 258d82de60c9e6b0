"""``next_core.cycle.run`` and ``next-core run``: whole runs of the real trainer from a config."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file

from next_core.config import load_config, make_config
from next_core.cycle.run import run
from next_core.errors import BackendError, CheckpointError, ConfigError
from next_core.plugins import registry
from next_core.run_config import RunConfig
from next_core.settings import Settings
from tests.cycle.descent import Descent

pytestmark = pytest.mark.trl

EXAMPLES = Path(__file__).parents[2] / "examples"


def small(**changes: Any) -> dict[str, Any]:
    """The quickstart with a twentieth of its work."""
    raw = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())
    raw |= {
        "steps": 16,
        "control": "none",
        "predictor": {"name": "secant", "window": 4},
        "schedule": {"observe": 8, "every": 4, "horizon": 4, "jump_every": 4, "settle": 4},
    }
    raw["training"] |= {"prompts_per_step": 4, "generations": 4, "learning_rate": 1e-3}
    raw["training"]["data"] = raw["training"]["data"] | {"test": "arithmetic/validation.jsonl"}
    for key, value in changes.items():
        merge = key in ("training", "schedule", "guards")
        raw[key] = raw.get(key, {}) | value if merge else value
    return raw


def config(**changes: Any) -> RunConfig:
    return make_config(small(**changes), base=EXAMPLES)


def final_adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "step-000016" / "adapter_model.safetensors")


def test_the_quickstart_config_is_valid_and_jumps_five_times() -> None:
    loaded = load_config(EXAMPLES / "quickstart.yaml")
    assert loaded.schedule.attempt_steps(loaded.steps) == [50, 60, 70, 80, 90]
    assert loaded.control == "plain"


def test_a_run_measures_itself_and_its_plain_control(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = run(config(control="plain"), tmp_path / "run", progress=lambda *facts: seen.append(facts))
    assert result.steps == 16
    assert [jump["step"] for jump in result.jumps] == [8, 12]
    assert all(jump["accepted"] and jump["norm_ratio"] > 0 for jump in result.jumps)
    assert all(0 < value < 1 for value in result.accuracy.values() if value is not None)
    assert None not in result.accuracy.values()
    assert result.accuracy["before_jump"] != result.accuracy["after_jump"]
    assert result.control is not None
    assert result.control["accuracy"]["final"] != result.accuracy["final"]
    assert {what for what, _, _ in seen} >= {"RL with jumps", "plain RL"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result.as_dict()
    assert (tmp_path / "run" / "config.yaml").exists()
    for seconds in ("rl", "ours", "total"):
        assert result.seconds[seconds] > 0


def test_stay_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    result = run(config(predictor="stay", control="plain"), tmp_path / "run")
    assert {jump["accepted"] for jump in result.jumps} == {False}
    assert result.control is not None
    assert result.control["accuracy"]["final"] == result.accuracy["final"]


def test_a_curve_has_both_splits_both_ways_and_the_seconds_and_changes_nothing(tmp_path: Path) -> None:
    unmeasured = run(config(), tmp_path / "unmeasured")
    result = run(config(measure_every=6, control="plain"), tmp_path / "run")
    assert [point["step"] for point in result.curve] == [0, 6, 12, 16]
    assert result.curve[-1]["test"]["sampled"] == result.accuracy["final"] == unmeasured.accuracy["final"]
    for point in result.curve:
        assert set(point["validation"]) == set(point["test"]) == {"sampled", "greedy"}
        assert all(0 < value < 1 for value in point["test"].values())
    seconds = [point["seconds"] for point in result.curve]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(result.seconds["rl"] + result.seconds["ours"], abs=0.1)
    assert result.control is not None
    plain = result.control["curve"]
    assert [point["step"] for point in plain] == [0, 6, 12, 16]
    assert plain[1]["test"] == result.curve[1]["test"], "no jump yet"
    assert plain[-1]["test"]["sampled"] == result.control["accuracy"]["final"]


def test_a_resumed_run_has_the_curve_of_the_whole_run(tmp_path: Path) -> None:
    def killed(what: str, done: int, total: int) -> None:
        if what == "RL with jumps" and done == 13:
            raise KeyboardInterrupt

    settings = config(save_every=5, measure_every=4)
    whole = run(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "killed", progress=killed)
    resumed = run(settings, tmp_path / "killed")
    assert [(p["step"], p["test"], p["validation"]) for p in resumed.curve] == [
        (p["step"], p["test"], p["validation"]) for p in whole.curve
    ]
    seconds = [point["seconds"] for point in resumed.curve]
    assert seconds == sorted(seconds)


def test_two_runs_of_one_seed_agree_bit_for_bit_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(config(seed=seed), tmp_path / name)
    a, b, c = (final_adapter(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize(
    "predictor", [{"name": "secant", "window": 4}, {"name": "rl-extra"}], ids=["factors", "merged"]
)
def test_a_killed_run_resumes_to_where_the_whole_run_ends(tmp_path: Path, predictor: dict[str, Any]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = config(save_every=5, predictor=predictor)
    finished = run(settings, whole)

    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "RL with jumps" and done == 13:
            raise Killed

    with pytest.raises(Killed):
        run(settings, killed, progress=kill)
    resumed = run(settings, killed)
    assert resumed.resumed_from == 10
    assert resumed.accuracy == finished.accuracy
    assert [j["step"] for j in resumed.jumps] == [j["step"] for j in finished.jumps]
    a, b = final_adapter(whole), final_adapter(killed)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_that_cannot_be_used_says_what_stands_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(), out)
    with pytest.raises(ConfigError, match="another config .there 'seed: 0', here 'seed: 5'.*--overwrite"):
        run(config(seed=5), out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not empty, and no run"):
            run(config(), other, overwrite=overwrite)
    assert (other / "thesis.tex").read_text() == "precious"


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = run(config(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert run(config(), tmp_path / "run") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged .*; remove it"):
        run(config(), tmp_path / "run")


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    def second(what: str, done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(ConfigError, match=rf"run is in use by process {os.getpid()}"):
                run(config(), tmp_path / "run", overwrite=True)

    assert run(config(), tmp_path / "run", progress=second).steps == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_setting_that_is_refused_leaves_the_earlier_run_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong = config(backend={"name": "trl", "args": {"learning_rat": 1}})
    with pytest.raises(ConfigError):
        run(wrong, out)
    assert not out.exists()
    run(config(), out)
    kept = sorted(path.relative_to(out) for path in out.rglob("*"))
    with pytest.raises(ConfigError):
        run(wrong, out, overwrite=True)
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == kept
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run(config(), tmp_path / "file")


def test_numbers_as_answers_and_conversations_are_understood_or_refused(tmp_path: Path) -> None:
    numbers, chat = tmp_path / "numbers.jsonl", tmp_path / "chat.jsonl"
    numbers.write_text("\n".join(json.dumps({"prompt": f"{a}+10=", "answer": a + 10}) for a in range(10, 30)))
    chat.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}))
    train = str(EXAMPLES / "arithmetic" / "train.jsonl")
    result = run(config(training={"data": {"train": train, "test": str(numbers)}}), tmp_path / "run")
    assert 0 < (result.accuracy["start"] or 0) < 1
    with pytest.raises(ConfigError, match="conversations"):
        run(config(training={"data": {"train": train, "test": str(chat)}}), tmp_path / "chat")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    settings, out = config(save_every=5), tmp_path / "run"
    finished = run(settings, out)
    state = out / "trainer" / "checkpoint-15" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    shutil.rmtree(out / "trainer" / "checkpoint-16")
    (out / "result.json").unlink()
    resumed = run(settings, out)
    assert resumed.resumed_from == 10
    assert resumed.accuracy == finished.accuracy
    assert any("checkpoint-15/trainer_state.json is missing or truncated" in note for note in resumed.notes)


@pytest.mark.parametrize(
    ("file", "step"), [("checkpoints/step-000012/adapter_model.safetensors", 10), ("jumps/0002/jump.json", 5)]
)
def test_damage_in_what_was_observed_falls_back_to_before_it(tmp_path: Path, file: str, step: int) -> None:
    settings, out = config(save_every=5), tmp_path / "run"
    finished = run(settings, out)
    content = bytearray((out / file).read_bytes())
    content[-3] ^= 1
    (out / file).write_bytes(content)
    (out / "result.json").unlink()
    resumed = run(settings, out)
    assert resumed.resumed_from == step  # of a jump that cannot be read it is not known when it was made
    assert resumed.accuracy == finished.accuracy
    assert any(file in note and f"went on from step {step}" in note for note in resumed.notes)


def test_a_run_that_was_killed_before_it_saved_anything_starts_again_or_says_why_not(tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    saving = config(save_every=15)
    for name, settings in (("saving", saving), ("not", config())):
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / name, progress=kill)
    assert run(saving, tmp_path / "saving").accuracy == run(saving, tmp_path / "whole").accuracy
    with pytest.raises(ConfigError, match="nothing to go on from: its config has no save_every"):
        run(config(), tmp_path / "not")
    assert (tmp_path / "not" / "checkpoints").is_dir()


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce++"])
def test_other_algorithms_run_and_jump(tmp_path: Path, algorithm: str) -> None:
    result = run(config(training={"algorithm": algorithm}), tmp_path / "run")
    assert [jump["accepted"] for jump in result.jumps] == [True, True]


def test_full_parameter_runs_jump_in_the_live_weights(tmp_path: Path) -> None:
    result = run(config(training={"lora": None, "learning_rate": 1e-4}), tmp_path / "run")
    assert [jump["accepted"] for jump in result.jumps] == [True, True]
    assert (tmp_path / "run" / "checkpoints" / "step-000016" / "model.safetensors").exists()


def test_generated_answers_can_be_the_measure(tmp_path: Path) -> None:
    result = run(config(training={"evaluation": "generate"}, steps=12, schedule={"jump_every": None}), tmp_path / "run")
    assert result.accuracy["start"] == pytest.approx(0.742, abs=0.03)  # greedy accuracy of the base on these prompts


def always_wrong(completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def test_a_reward_is_chosen_by_module_and_function(tmp_path: Path) -> None:
    settings = config(training={"reward": "tests.cycle.test_run:always_wrong"}, predictor="secant")
    result = run(settings, tmp_path / "run")
    # Equal rewards are no advantage, no advantage is no gradient: nothing moves, and no jump is made of it.
    assert {jump["accepted"] for jump in result.jumps} == {False}
    assert result.accuracy["final"] == result.accuracy["start"]
    assert "moved" in result.jumps[0]["reason"]


def broken(completions: list[str], **columns: Any) -> list[float]:
    raise ZeroDivisionError("the reward's own mistake")


def test_an_error_inside_the_trainer_is_one_message_and_a_file(tmp_path: Path) -> None:
    settings = config(training={"reward": "tests.cycle.test_run:broken"})
    with pytest.raises(BackendError, match="the reward's own mistake"):
        run(settings, tmp_path / "run")
    assert "ZeroDivisionError" in (tmp_path / "run" / "error.log").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rat": 1}, "did you mean"),
        ({"max_steps": 5}, "run config"),
        ({"num_iterations": 3}, "multiples of 3"),
    ],
)
def test_trl_arguments_are_checked_before_training(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config(backend={"name": "trl", "args": args}), tmp_path / "run")


def test_the_command_ends_with_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    raw = small()
    raw["training"]["model"] = str(EXAMPLES / "arithmetic" / "base")
    raw["training"]["data"] = {k: str(EXAMPLES / v) for k, v in raw["training"]["data"].items()}
    code = "def reward(completions, answer, **_):\n    return [1.0 * (c == a) for c, a in zip(completions, answer)]\n"
    (tmp_path / "beside.py").write_text(code)
    raw["training"]["reward"] = "beside:reward"
    path.write_text(yaml.safe_dump(raw))
    command = [
        str(Path(sys.executable).parent / "next-core"),
        "run",
        str(path),
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (last,) = done.stdout.strip().splitlines()
    facts = json.loads(last)
    assert facts["steps"] == 16
    assert set(facts["accuracy"]) == {"start", "before_jump", "after_jump", "final"}
    for jump in facts["jumps"]:
        assert {"step", "predictor", "alpha", "norm_ratio", "accepted", "reason"} <= set(jump)
    assert "RL with jumps" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == facts
    assert "holds this run, and it is finished; --overwrite runs it again" in again.stderr


class Failures(Settings):
    fails: tuple[str, ...] = ()


class Watched(Descent):
    """Keeps what was asked of each trainer, as ``"1 prepare"``, and fails where its config says so."""

    name = "watched"
    config_class = Failures
    events: ClassVar[list[str]] = []
    folder_at_close: ClassVar[list[bool]] = []

    def __init__(self, config: Failures) -> None:
        super().__init__()
        self.config = config
        self.number = 1 + max((int(event.split()[0]) for event in self.events), default=0)

    def _told(self, what: str) -> None:
        self.events.append(f"{self.number} {what}")
        if self.events[-1] in self.config.fails:
            raise ZeroDivisionError(f"{self.events[-1]} failed")

    def prepare(self, run: Any, out: Path, resume: bool = False) -> int:
        self.out = out
        self._told("prepare")
        return super().prepare(run, out, resume)

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        self._told("train")
        super().train(until, step_ended)

    def close(self) -> None:
        self.folder_at_close.append(self.out.is_dir())
        self._told("close")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """``watched("1 train")``: a run, and its plain control, of which the first trainer's training fails."""
    monkeypatch.setattr(registry(), "_entries", dict(registry()._entries))
    registry().add(Watched)
    Watched.events.clear()
    Watched.folder_at_close.clear()
    return lambda *fails: config(backend={"name": "watched", "fails": fails}, control="plain", save_every=4)


FIRST, CONTROL = ["1 prepare", "1 train", "1 close"], ["2 prepare", "2 train", "2 close"]


def test_a_trainer_is_ended_once_and_before_the_plain_one_is_started(
    watched: Callable[..., RunConfig], tmp_path: Path
) -> None:
    result = run(watched(), tmp_path / "run")
    assert Watched.events == FIRST + CONTROL
    assert [jump["accepted"] for jump in result.jumps] == [True, True]
    assert result.control is not None
    assert {"setup", "rl", "ours", "measuring", "total"} <= set(result.seconds)


@pytest.mark.parametrize(
    ("fails", "events"),
    [
        ("1 prepare", ["1 prepare", "1 close"]),
        ("1 train", FIRST),
        ("1 close", FIRST),
        ("2 prepare", [*FIRST, "2 prepare", "2 close"]),
        ("2 train", FIRST + CONTROL),
        ("2 close", FIRST + CONTROL),
    ],
)
def test_a_trainer_is_ended_once_when_something_fails(
    fails: str, events: list[str], watched: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=f"ZeroDivisionError: {fails} failed"):
        run(watched(fails), tmp_path / "run")
    assert Watched.events == events
    assert all(Watched.folder_at_close)  # it may write there until it is ended
    assert (tmp_path / "run").exists() == (fails != "1 prepare")
    # A run that is over keeps its result, whatever fails after it.
    assert (tmp_path / "run" / "result.json").exists() == (fails not in ("1 prepare", "1 train"))


@pytest.mark.parametrize("fails", ["1 prepare", "1 train", "2 prepare", "2 train"])
def test_the_first_error_is_the_one_that_is_seen(fails: str, watched: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=f"ZeroDivisionError: {fails} failed") as caught:
        run(watched(fails, "1 close" if fails[0] == "1" else "2 close"), tmp_path / "run")
    assert Watched.events[-1] == f"{fails[0]} close"
    (note,) = caught.value.__notes__
    assert f"{fails[0]} close failed" in note


def test_an_interrupted_trainer_and_one_that_found_nothing_to_go_on_from_are_ended(
    watched: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    settings = watched()
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", progress=interrupt)
    assert Watched.events == FIRST
    run(settings, tmp_path / "run")
    again = [f"{number} {what}" for number in (3, 4) for what in ("prepare", "train", "close")]
    assert Watched.events[3:] == ["2 prepare", "2 close", *again]


@pytest.mark.parametrize("average", [None, 8], ids=["plain", "averaged"])
def test_a_run_resumed_at_its_last_step_trains_no_further(tmp_path: Path, average: int | None) -> None:
    """transformers resets its sign to stop when training begins, and looks at it after a step only."""
    settings = config(save_every=8, measure_every=4, schedule={"average": average}, training={"learning_rate": 1e-2})
    finished = run(settings, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed just before
    resumed = run(settings, tmp_path / "run")
    assert resumed.resumed_from == 16
    assert resumed.accuracy == finished.accuracy
    assert [(p["step"], p["test"]) for p in resumed.curve] == [(p["step"], p["test"]) for p in finished.curve]
    assert resumed.average == finished.average
    assert resumed.jumps == finished.jumps
    state = json.loads((tmp_path / "run" / "trainer" / "checkpoint-16" / "trainer_state.json").read_text())
    assert state["global_step"] == 16
    assert not (tmp_path / "run" / "trainer" / "checkpoint-17").exists()
