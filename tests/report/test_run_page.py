"""The page of a run: finished or not, from a config or from the callback, with and without checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from next_core.cycle.journal import read_journal
from next_core.diagnostics import Analysis
from next_core.report import charts, geometry
from next_core.report.geometry import GeometryOptions
from next_core.report.inputs import Recorded
from next_core.report.write import write_report
from next_core.storage.json_lines import json_line
from tests.conftest import LoraRun, MakeRun
from tests.errors import raises_kind
from tests.report.conftest import read_page
from tests.report.made import Object, jumps

CONFIG = """steps: 50
predictor: {name: auto}  # <script>
training: {model: Qwen/Qwen2.5-0.5B, learning_rate: 0.001, data: {train: data/gsm8k/train.jsonl}}
"""
QUICK = GeometryOptions(wanted=False)


def journal(folder: Path, *records: Object) -> None:
    (folder / "journal.jsonl").write_bytes(b"".join(json_line(record) for record in records))


def point(step: int, sampled: float, greedy: float) -> Object:
    accuracies = {"sampled": sampled, "greedy": greedy}
    return {"step": step, "seconds": 0.2 * step, "validation": accuracies, "test": accuracies}


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A finished run without checkpoints: twelve jumps, two of them refused."""
    attempted = jumps(range(20, 44, 2), 5, "auto", multiple=True)
    start = {"event": "start", "step": 0, "steps": 50, "seed": 3}
    made = [{"event": "jump", **jump} for jump in attempted]
    tested = [{"event": "accuracy", "step": step, "value": value} for step, value in ((0, 0.2), (50, 0.45))]
    journal(tmp_path, start, tested[0], *made, tested[1], {"event": "end", "step": 50})
    plain = [point(0, 0.2, 0.7), point(50, 0.3, 0.8)]
    result = {
        "steps": 50,
        "seconds": {"rl": 7.0, "ours": 1.0, "ours_probe": 0.6, "ours_predict": 0.4, "setup": 2.0, "total": 20.0},
        "accuracy": {"start": 0.2, "before_jump": 0.25, "after_jump": 0.26, "final": 0.45},
        "jumps": attempted,
        "folder": "somewhere",
        "control": {"steps": 50, "seconds": 6.0, "accuracy": {"final": 0.3}, "curve": plain},
        "resumed_from": None,
        "settings": {"predictor": "auto", "seed": 3, "algorithm": "grpo"},
        "notes": ["checkpoints are fp32 <b>"],
        "curve": [point(0, 0.2, 0.7), point(25, 0.3, 0.75), point(50, 0.45, 0.6)],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_a_finished_run_is_compared_with_its_plain_run(ended: Path) -> None:
    written = write_report(ended, settings=QUICK)
    seen = read_page(written.out)
    sampled, greedy, attempted = written.summary
    for numbers, sentence in (
        (("50 RL steps", "0.200", "0.450", "0.300"), sampled),
        (("0.700", "0.600", "0.800"), greedy),
        (("12 jumps", "10 made", "2 refused"), attempted),
    ):
        assert all(number in sentence for number in numbers)
        assert sentence in seen.words
    for words in ("accuracy fell", "# <script>", "checkpoints are fp32 <b>.", "seed 3", "learning rate 0.001"):
        assert words in seen.words
    assert "<h1>Qwen/Qwen2.5-0.5B on gsm8k</h1>" in seen.page
    for words in ("RL steps 7.0 s 35.0%", "next-core: predicting 0.40 s 2.0%", "the plain run 6.0 s 30.0%"):
        assert words in seen.words
    starts = [label.split(" ")[0] for label in seen.pictures]
    assert starts == ["Learning", "Test"]
    assert 'data-name="multiple"' in seen.page
    assert written.missing.keys() == {"Geometry"}


def test_step_scaling_shows_its_returns_and_the_advice_before_everything_else(ended: Path) -> None:
    rates = [(5, 1e-4), (10, 2.5e-5), (15, 5e-5)]
    scaling = [{"event": "scale", "step": s, "accepted": True, "multiple": r / 1e-4, "rate": r} for s, r in rates]
    scaling[1]["back_to"] = 0
    fall = {"event": "collapse", "step": 40, "back_to": 30, "reward": 0.1, "best": 0.5, "multiple": 0.2, "rate": 2e-5}
    refused = {"event": "scale", "step": 45, "accepted": False, "reason": "the multiple is nan", "multiple": 0.2}
    advice = {"event": "advice", "step": 50, "text": "Lower learning_rate to about 5e-05. It stops agreeing there."}
    end = {"event": "end", "step": 50}
    journal(ended, {"event": "start", "step": 0, "seed": 3}, *scaling, fall, refused, advice, end)
    result = json.loads((ended / "result.json").read_text()) | {"jumps": [], "scaling": [*scaling, fall, refused]}
    (ended / "result.json").write_text(json.dumps(result))
    written = write_report(ended, settings=QUICK)
    seen = read_page(written.out)
    assert "at most 0.0001, 2e-05 last" in written.summary[-1]
    assert "back to step 0 after step 10, back to step 30 after step 40" in written.summary[-1]
    assert "10 0 the first steps cancelled each other" in seen.words
    assert "40 30 the reward fell to 0.100 from 0.500" in seen.words
    assert "45 the multiple is nan" in seen.words
    for words in ("Lower learning_rate to about 5e-05. It stops", "training: {learning_rate: 5e-05}"):
        assert words in seen.words
        assert seen.words.index(words) < seen.words.index("Returns to earlier weights")
    assert "Geometry" not in written.missing


def test_a_callbacks_run_is_titled_and_its_reward_has_a_band(tmp_path: Path) -> None:
    about = {"model": "/models/tiny", "task": "exact", "learning_rate": 1e-5, "rollouts": 64, "date": "2026-11-30"}
    journal(tmp_path, {"event": "start", "step": 0, "steps": 30, "about": about}, {"event": "end", "step": 30})
    lines = [json_line({"step": step, "reward": 0.2 + step / 100, "reward_std": 0.4}) for step in range(5, 31, 5)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    written = write_report(tmp_path, settings=QUICK)
    seen = read_page(written.out)
    assert "<h1>models/tiny on exact</h1>" in seen.page
    (tmp_path / "config.yaml").write_text("training: {learning_rate: '1e-4'}")  # text
    assert "learning rate 1e-4" in read_page(write_report(tmp_path, settings=QUICK).out).words
    assert "learning rate 1e-05" in seen.words
    assert "from 0.250 to 0.500" in written.summary[0]
    squared = 0.4**2 / (64 * 5)  # 5 rises of .05 count twice; the clustering of 4 that is assumed counts as 4 pairs
    half = 1.96 * ((5 * 2 * 0.05**2 + 4 * 4 * 2 * squared) / (9 * 2)) ** 0.5
    assert f"({0.25 - half:.3g} to {0.25 + half:.3g})" in seen.page


def test_two_runs_are_shown_side_by_side(ended: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "b"
    shutil.copytree(ended, other)
    records = read_journal(other / "journal.jsonl")
    journal(other, *(record | ({"value": 0.55} if record.get("value") == 0.45 else {}) for record in records))
    written = write_report([ended, other], out=other / "both.html")
    seen = read_page(written.out)
    assert written.kind == "runs"
    assert "other0/b 0.550, " in written.summary[0]
    assert "Test accuracy at the end 0.450 0.550" in seen.words
    assert "Test accuracy at the start 0.200" in seen.words
    (linked := other.parent / "linked").symlink_to(other)
    with raises_kind("report-unknown-folder", linked, "twice"):
        write_report([ended, other, linked], out=other / "both.html")


def test_equal_neighbours_are_one_row_and_a_long_table_is_folded(ended: Path) -> None:
    result = json.loads((ended / "result.json").read_text())
    same = {"accepted": False, "reason": "gate: closed", "predictor": "secant"}
    attempted = [*jumps(range(20, 44, 2), 10), *({"step": step, **same} for step in range(50, 90, 10))]
    (ended / "result.json").write_text(json.dumps(result | {"jumps": attempted, "curve": []}))
    (ended / "journal.jsonl").unlink()
    seen = read_page(write_report(ended, settings=QUICK).out)
    assert "50 to 80 (4 times) secant" in seen.words
    assert "<summary>Every attempted jump (13 rows)</summary>" in seen.page


def test_an_unfinished_run_is_described_from_its_journal_and_metrics(ended: Path) -> None:
    (ended / "result.json").unlink()
    lines = [json_line({"step": step, "reward": 0.2 + step / 100}) for step in range(0, 31, 5)]
    (ended / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 35, "rew')
    journal_lines = (ended / "journal.jsonl").read_text().splitlines()
    (ended / "journal.jsonl").write_text("\n".join(journal_lines[:-2]) + '\n{"event": "ju')
    written = write_report(ended, settings=QUICK)
    assert "step 42" in written.summary[0]
    assert "reward rose from 0.200 to 0.500" in written.summary[0]
    assert "measure_every" in written.missing["Accuracy over seconds"]


def test_a_journal_alone_makes_a_page_of_reasons(tmp_path: Path) -> None:
    journal(tmp_path, {"event": "start", "step": 0, "schedule": {"observe": 50, "jumps": None}})
    written = write_report(tmp_path)
    seen = read_page(written.out)
    assert "observe 50" in seen.words
    assert written.missing.keys() == {"Learning curve", "Accuracy over seconds", "Geometry", "Time", "Config"}
    assert all(reason in seen.words for reason in written.missing.values())


def test_weights_are_compared_with_random_walks(own_lora_run: LoraRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "CUTS", 3)
    monkeypatch.setattr(geometry, "DRAWS", 2)
    folder = own_lora_run.path.parent
    journal(folder, {"event": "start", "step": 0})
    reported: set[str] = set()
    written = write_report(folder, progress=lambda what, done, total: reported.add(what))
    seen = read_page(written.out)
    assert "6 checkpoints of steps 10 to 60" in seen.words
    assert "13 matrices changed, 1 did not" in seen.words
    assert "random walk" in seen.pictures[0]
    assert {"read motion", "predict"} <= reported
    assert len(seen.pictures) == 6
    assert "Best: model.layers." in seen.pictures[-1]
    assert "Geometry" not in written.missing


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing but what the weights alone need."""
    monkeypatch.setattr(Analysis, "draw", lambda self: {})
    monkeypatch.setattr(charts, "against_walks", lambda analysis: "not drawn")


@pytest.mark.usefixtures("measured")
def test_too_few_damaged_or_no_checkpoints_give_reasons(make_lora_run: MakeRun, tmp_path: Path) -> None:
    run = make_lora_run(tmp_path / "run" / "checkpoints", (10,))
    journal(tmp_path / "run", {"event": "start", "step": 0})
    written = write_report(tmp_path / "run")
    assert "2 checkpoints" in written.missing["Skill by layer"]
    assert "3 checkpoints" in read_page(written.out).words
    weights = run.folder(10) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert str(weights) in write_report(tmp_path / "run").missing["Geometry"]
    shutil.rmtree(run.path)
    run.path.mkdir()
    assert str(run.path) in write_report(tmp_path / "run").missing["Geometry"]


@pytest.mark.usefixtures("measured")
def test_a_predictor_that_never_acts_is_missing_with_its_reason(own_lora_run: LoraRun) -> None:
    journal(own_lora_run.path.parent, {"event": "start", "step": 0})
    written = write_report(own_lora_run.path.parent, settings=GeometryOptions(predictor="stay"))
    assert "stay" in written.missing["Skill by layer"]


def test_an_unknown_predictor_is_an_error_before_the_work(ended: Path) -> None:
    for name, kind in (("sekant", "plugin-unknown"), ("step-scale", "predictor-needs-trainer")):
        with raises_kind(kind, name, "secant"):
            write_report(ended, settings=GeometryOptions(predictor=name))
    assert not (ended / "report").exists()


CURVE = '{"steps": 5, "curve": [{"step": 1, "test": {"sampled": "high"}}]}'
JUMP = json_line({"event": "jump", "step": 5}).decode()


@pytest.mark.parametrize(
    ("name", "text", "kind", "place"),
    [
        ("result.json", '{"steps": 50', "report-damaged-file", ""),
        ("result.json", '{"steps": "fifty"}', "report-damaged-file", "result.json.steps"),
        ("result.json", CURVE, "report-damaged-file", "curve.0.test.sampled"),
        ("journal.jsonl", JUMP, "checkpoint-journal-damaged", "jumps.0.accepted"),
    ],
)
def test_damage_names_the_file_and_the_place(ended: Path, name: str, text: str, kind: str, place: str) -> None:
    (ended / name).write_text(text)
    with raises_kind(kind, ended / name, place):
        write_report(ended, settings=QUICK)


@pytest.mark.parametrize(
    ("training", "found"),
    [
        ({"model": "{here}", "lora": None}, True),
        ({"model": "{here}", "lora": {"rank": 8}}, False),
        ({"model": "{here}/gone", "lora": None}, False),
    ],
)
def test_the_base_model_comes_from_the_config(tmp_path: Path, training: dict[str, Any], found: bool) -> None:
    training["model"] = training["model"].format(here=tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({"training": training}))
    assert Recorded(tmp_path).backbone == (tmp_path if found else None)
