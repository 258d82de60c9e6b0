"""``next_core.cycle.run`` and ``next-core run``: whole runs of the real trainer from a config."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from next_core.config import load_config
from next_core.cycle.run import RUNNING, run
from next_core.cycle.run_result import RunResult
from next_core.plugins import registry
from next_core.run_config import Choice, RunConfig
from next_core.settings import Settings
from tests.crash import small_run
from tests.cycle.descent import Descent
from tests.errors import raises_kind

pytestmark = pytest.mark.trl

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 16
OURS: dict[str, Any] = {
    "steps": STEPS,
    "save_every": None,
    "measure_every": None,
    "predictor": {"name": "secant", "window": 4},
    "schedule": {"observe": 8, "every": 4, "horizon": 4, "jump_every": 4, "settle": 4, "alpha": 1.0, "average": None},
    "guards": {"recovery": None, "tolerance": 0.02, "max_drop": 0.2},
}


def config(folder: Path, **changes: Any) -> RunConfig:
    """A run of 16 steps that jumps after the 8th and the 12th; its prompts are written into ``folder``."""
    raw = small_run.raw_config(folder / "data", **OURS)
    for key, value in changes.items():
        raw[key] = raw[key] | value if key in ("training", "schedule", "guards") else value
    return small_run.checked(raw)


@dataclass
class Whole:
    """A run to its end, with checkpoints of the trainer at steps 5, 10, 15 and 16 and a curve."""

    config: RunConfig
    out: Path
    result: RunResult
    progress: list[tuple[str, int, int]]

    def copy(self, folder: Path) -> Path:
        """The same run, of which the result was not written."""
        out = shutil.copytree(self.out, folder / "copy")
        (out / "result.json").unlink()
        return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    seen: list[tuple[str, int, int]] = []
    settings = config(folder, save_every=5, measure_every=4)
    result = run(settings, folder / "run", progress=lambda *facts: seen.append(facts))
    return Whole(settings, folder / "run", result, seen)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run whose predictor never jumps, and the plain run it is compared with."""
    folder = tmp_path_factory.mktemp("plain")
    return run(config(folder, predictor="stay", control="plain", measure_every=6), folder / "run")


def test_a_run_jumps_and_measures_itself(whole: Whole, plain: RunResult) -> None:
    result = whole.result
    assert result.steps == STEPS
    assert [jump["step"] for jump in result.jumps] == [8, 12]
    assert all(jump["accepted"] and jump["norm_ratio"] > 0 for jump in result.jumps)
    assert set(result.accuracy) == {"start", "before_jump", "after_jump", "final"}
    assert all(0 < (value or 0) < 1 for value in result.accuracy.values())
    assert result.accuracy["before_jump"] != result.accuracy["after_jump"]
    assert result.accuracy["final"] != plain.control["accuracy"]["final"]
    assert (RUNNING, 16, 16) in whole.progress
    assert json.loads((whole.out / "result.json").read_text()) == result.as_dict()
    assert load_config(whole.out / "config.yaml") == whole.config
    assert all(result.seconds[part] > 0 for part in ("rl", "ours", "ours_predict", "ours_probe", "total"))


def test_a_predictor_that_stays_gives_the_plain_run_bit_for_bit(plain: RunResult) -> None:
    assert {jump["accepted"] for jump in plain.jumps} == {False}
    assert plain.control["accuracy"]["final"] == plain.accuracy["final"]
    curves = [[(point["step"], point["test"]) for point in curve] for curve in (plain.curve, plain.control["curve"])]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [0, 6, 12, 16]


def test_a_curve_has_both_splits_both_ways_and_the_seconds(whole: Whole) -> None:
    curve, seconds = whole.result.curve, [point["seconds"] for point in whole.result.curve]
    assert [point["step"] for point in curve] == [0, 4, 8, 12, 16]
    assert curve[-1]["test"]["sampled"] == whole.result.accuracy["final"]
    for point in curve:
        assert set(point["validation"]) == set(point["test"]) == {"sampled", "greedy"}
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    assert seconds[-1] <= whole.result.seconds["rl"] + whole.result.seconds["ours"]


def test_neither_measuring_nor_saving_changes_a_run(whole: Whole, tmp_path: Path) -> None:
    unmeasured = run(config(tmp_path), tmp_path / "run")
    assert unmeasured.accuracy["final"] == whole.result.accuracy["final"]
    name = Path("checkpoints", f"step-{STEPS:06d}", "adapter_model.safetensors")
    mine, other = load_file(tmp_path / "run" / name), load_file(whole.out / name)
    assert all(torch.equal(value, other[key]) for key, value in mine.items())


def test_a_run_resumed_at_its_last_step_trains_no_further(whole: Whole, tmp_path: Path) -> None:
    """transformers resets its sign to stop when training begins, and looks at it after a step only."""
    out = whole.copy(tmp_path)
    resumed = run(whole.config, out)
    assert resumed.resumed_from == 16
    for fact in ("accuracy", "jumps", "average"):
        assert getattr(resumed, fact) == getattr(whole.result, fact)
    points = [
        [(point["step"], point["test"], point["validation"]) for point in result.curve]
        for result in (resumed, whole.result)
    ]
    assert points[0] == points[1]
    seconds = [point["seconds"] for point in resumed.curve]
    assert seconds == sorted(seconds)
    assert json.loads((out / "trainer" / "checkpoint-16" / "trainer_state.json").read_text())["global_step"] == 16
    assert not (out / "trainer" / "checkpoint-17").exists()


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ("trainer/checkpoint-16/trainer_state.json", 15),
        ("checkpoints/step-000012/adapter_model.safetensors", 10),
        ("jumps/0002/jump.json", 5),  # it is not known when a jump that cannot be read was made
    ],
)
def test_damage_falls_back_to_the_checkpoint_before_it(whole: Whole, tmp_path: Path, file: str, step: int) -> None:
    out = whole.copy(tmp_path)
    content = bytearray((out / file).read_bytes())
    content[-3] ^= 1
    (out / file).write_bytes(content)
    resumed = run(whole.config, out)
    assert resumed.resumed_from == step
    assert resumed.accuracy == whole.result.accuracy
    assert any(file in note for note in resumed.notes)


def test_damage_before_every_state_of_the_trainer_deletes_nothing(whole: Whole, tmp_path: Path) -> None:
    out = whole.copy(tmp_path)
    file = out / "checkpoints" / "step-000004" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[::-1])
    before = sorted(out.rglob("*"))
    with raises_kind("checkpoint-damaged", file, "--overwrite"):
        run(whole.config, out)
    assert sorted(out.rglob("*")) == before


def test_a_run_killed_before_it_saved_anything_starts_again_or_says_why_not(whole: Whole, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    for name, settings in (("saving", whole.config), ("not", config(tmp_path))):
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / name, progress=kill)
    assert run(whole.config, tmp_path / "saving").accuracy == whole.result.accuracy
    with raises_kind("config-other-run", tmp_path / "not", "save_every", "--overwrite"):
        run(config(tmp_path), tmp_path / "not")
    assert (tmp_path / "not" / "checkpoints").is_dir()


def test_a_folder_that_cannot_be_used_is_named_with_what_is_in_it(whole: Whole, tmp_path: Path) -> None:
    with raises_kind("config-other-run", whole.out, "'seed: 0'", "'seed: 5'", "--overwrite"):
        run(whole.config.model_copy(update={"seed": 5}), whole.out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with raises_kind("config-folder-not-empty", other):
            run(whole.config, other, overwrite=overwrite)
    assert (other / "thesis.tex").read_text() == "precious"
    with raises_kind("config-folder-not-empty", "thesis.tex"):
        run(whole.config, other / "thesis.tex")


def test_a_finished_run_is_not_run_again(whole: Whole, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.out.rglob("*")}
    assert run(whole.config, whole.out) == whole.result
    assert {path: path.stat().st_mtime_ns for path in whole.out.rglob("*")} == before
    out = whole.copy(tmp_path)
    (out / "result.json").write_text("{}")
    with raises_kind("checkpoint-damaged", out / "result.json"):
        run(whole.config, out)


def test_a_setting_that_is_refused_leaves_the_earlier_run_as_it_was(whole: Whole, tmp_path: Path) -> None:
    wrong = whole.config.model_copy(
        update={"backend": Choice.model_validate({"name": "trl", "args": {"learning_rat": 1}})}
    )
    with raises_kind("config-unknown-key", "learning_rat"):
        run(wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    kept = sorted(whole.out.rglob("*"))
    with raises_kind("config-unknown-key", "learning_rat"):
        run(wrong, whole.out, overwrite=True)
    assert sorted(whole.out.rglob("*")) == kept


SHORT = {"steps": 6, "schedule": {"observe": 2, "every": 2, "horizon": 2, "jump_every": 2, "settle": 2}}
SHORT |= {"predictor": {"name": "secant", "window": 2}}


def test_numbers_as_answers_are_understood_and_conversations_refused(tmp_path: Path) -> None:
    numbers, chat = tmp_path / "numbers.jsonl", tmp_path / "chat.jsonl"
    numbers.write_text("\n".join(json.dumps({"prompt": f"{a}+10=", "answer": a + 10}) for a in range(10, 18)))
    chat.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}))
    train = str(EXAMPLES / "arithmetic" / "train.jsonl")
    result = run(config(tmp_path, training={"data": {"train": train, "test": str(numbers)}}, **SHORT), tmp_path / "run")
    assert 0 < (result.accuracy["start"] or 0) < 1
    with raises_kind("config-contradiction", "conversations", "training.evaluation: generate"):
        run(config(tmp_path, training={"data": {"train": train, "test": str(chat)}}), tmp_path / "chat")


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce++"])
def test_other_algorithms_run_and_jump(tmp_path: Path, algorithm: str) -> None:
    result = run(config(tmp_path, training={"algorithm": algorithm}, **SHORT), tmp_path / "run")
    assert [jump["accepted"] for jump in result.jumps] == [True, True]


def test_generated_answers_can_be_the_measure(whole: Whole, tmp_path: Path) -> None:
    result = run(config(tmp_path, training={"evaluation": "generate", "max_new_tokens": 5}, **SHORT), tmp_path / "run")
    assert result.accuracy["start"] == whole.result.curve[0]["test"]["greedy"] > 0  # of the same prompts, exactly


def broken(completions: list[str], **columns: Any) -> list[float]:
    raise ZeroDivisionError("the reward's own mistake")


def test_an_error_inside_the_trainer_is_one_message_and_a_file(tmp_path: Path) -> None:
    log = tmp_path / "run" / "error.log"
    with raises_kind("backend-failed", "the reward's own mistake", log):
        run(config(tmp_path, training={"reward": "tests.cycle.test_run:broken"}), tmp_path / "run")
    assert "ZeroDivisionError" in log.read_text()


def test_a_trl_argument_that_the_config_sets_itself_is_refused(tmp_path: Path) -> None:
    with raises_kind("config-contradiction", "max_steps"):
        run(config(tmp_path, backend={"name": "trl", "args": {"max_steps": 5}}), tmp_path / "run")


def test_the_command_ends_with_one_json_object(tmp_path: Path, cli: Callable[..., Any]) -> None:
    raw = small_run.raw_config(tmp_path / "data", **OURS | SHORT)
    code = "def reward(completions, answer, **_):\n    return [1.0 * (c == a) for c, a in zip(completions, answer)]\n"
    (tmp_path / "reward_of_mine.py").write_text(code)
    raw["training"]["reward"] = "reward_of_mine:reward"
    path = tmp_path / "small.yaml"
    path.write_text(small_run.dumped(raw))
    command = ("run", path, "--out", tmp_path / "run", "--json")
    done = cli(*command)
    assert done.code == 0, done.err
    (last,) = done.out.strip().splitlines()
    facts = json.loads(last)
    assert facts["steps"] == 6
    for jump in facts["jumps"]:
        assert {"step", "predictor", "alpha", "norm_ratio", "accepted", "reason"} <= set(jump)
    assert RUNNING in done.err
    again = cli(*command)
    assert json.loads(again.out) == facts
    assert "--overwrite" in again.err


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

    def _record(self, what: str) -> None:
        self.events.append(f"{self.number} {what}")
        if self.events[-1] in self.config.fails:
            raise ZeroDivisionError(f"{self.events[-1]} failed")

    def prepare(self, run: Any, out: Path, resume: bool = False) -> int:
        self.out = out
        self._record("prepare")
        return super().prepare(run, out, resume)

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        self._record("train")
        super().train(until, step_ended)

    def close(self) -> None:
        self.folder_at_close.append(self.out.is_dir())
        self._record("close")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., RunConfig]:
    """``watched("1 train")``: a run, and its plain control, of which the first trainer's training fails."""
    monkeypatch.setattr(registry(), "_entries", dict(registry()._entries))
    registry().add(Watched)
    Watched.events.clear()
    Watched.folder_at_close.clear()
    return lambda *fails: config(tmp_path, backend={"name": "watched", "fails": fails}, control="plain", save_every=4)


FIRST, CONTROL = ["1 prepare", "1 train", "1 close"], ["2 prepare", "2 train", "2 close"]


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
def test_trainers_end_once(fails: str, events: list[str], watched: Callable[..., RunConfig], tmp_path: Path) -> None:
    with raises_kind("backend-failed", f"ZeroDivisionError: {fails} failed"):
        run(watched(fails), tmp_path / "run")
    assert Watched.events == events
    assert all(Watched.folder_at_close)  # it may write there until it is ended
    assert (tmp_path / "run").exists() == (fails != "1 prepare")
    # A run that is over keeps its result, whatever fails after it.
    assert (tmp_path / "run" / "result.json").exists() == (fails not in ("1 prepare", "1 train"))


@pytest.mark.parametrize("fails", ["1 train", "2 prepare"])
def test_the_first_error_is_the_one_that_is_seen(fails: str, watched: Callable[..., RunConfig], tmp_path: Path) -> None:
    with raises_kind("backend-failed", f"ZeroDivisionError: {fails} failed") as caught:
        run(watched(fails, f"{fails[0]} close"), tmp_path / "run")
    (note,) = caught.value.__notes__
    assert f"{fails[0]} close failed" in note


def test_an_interrupted_or_unresumable_trainer_is_ended(watched: Callable[..., RunConfig], tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    settings = watched()
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", progress=interrupt)
    assert Watched.events == FIRST
    run(settings, tmp_path / "run")
    again = [f"{number} {what}" for number in (3, 4) for what in ("prepare", "train", "close")]
    assert Watched.events[3:] == ["2 prepare", "2 close", *again]
