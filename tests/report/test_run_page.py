"""The page of a run: finished or not, of a config or of the callback, with and without what can be measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from next_core.errors import CheckpointError, PluginError
from next_core.report.geometry import GeometryOptions
from next_core.report.inputs import Recorded
from next_core.report.write import write_report
from next_core.storage.json_lines import json_line
from tests.conftest import LoraRun, Outcome
from tests.report.conftest import read_page
from tests.report.made import Object, jumps

QUICK = GeometryOptions(wanted=False)


def journal(folder: Path, *records: Object) -> None:
    (folder / "journal.jsonl").write_bytes(b"".join(json_line(record) for record in records))


def point(step: int, sampled: float, greedy: float) -> Object:
    accuracies = {"sampled": sampled, "greedy": greedy}
    return {"step": step, "seconds": 0.2 * step, "validation": accuracies, "test": accuracies}


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run that ended, without checkpoints: twelve jumps, two of them refused."""
    tried = jumps(range(20, 44, 2), 5, "auto", multiple=True)
    start = {"event": "start", "step": 0, "steps": 50, "seed": 3}
    journal(tmp_path, start, *({"event": "jump", **jump} for jump in tried), {"event": "end", "step": 50})
    accuracy = {"start": 0.2, "before_jump": 0.25, "after_jump": 0.26, "final": 0.45}
    plain = [point(0, 0.2, 0.7), point(50, 0.3, 0.8)]
    result = {
        "steps": 50,
        "seconds": {"rl": 7.0, "ours": 1.0, "ours_probe": 0.6, "ours_predict": 0.4, "setup": 2.0, "total": 20.0},
        "accuracy": accuracy,
        "jumps": tried,
        "folder": "somewhere",
        "control": {"steps": 50, "seconds": 6.0, "accuracy": {"final": 0.3}, "curve": plain},
        "resumed_from": None,
        "settings": {"predictor": "auto", "seed": 3, "algorithm": "grpo"},
        "notes": ["checkpoints are fp32 <b>"],
        "curve": [point(0, 0.2, 0.7), point(25, 0.3, 0.75), point(50, 0.45, 0.6)],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "config.yaml").write_text("steps: 50\npredictor: {name: auto}  # <script>\n")
    return tmp_path


def test_a_run_is_summed_up_beside_its_plain_run_and_its_greedy_answers(ended: Path) -> None:
    written = write_report(ended, settings=QUICK)
    seen = read_page(written.out)
    assert "test accuracy went from 0.200 to 0.450" in written.summary[0]
    assert "ended at 0.300, 0.150 below it" in written.summary[0]
    assert "greedy ones went from 0.700 to 0.600; that of the plain run ended at 0.800" in written.summary[1]
    assert "12 jumps tried: 10 made" in written.summary[2]
    assert "2 refused" in written.summary[2]
    for words in ("accuracy fell", "# <script>", "checkpoints are fp32 <b>.", "next-core: predicting", "seed 3"):
        assert words in seen.words
    assert [label.split(",")[0].split(":")[0] for label in seen.pictures] == [
        "Test accuracy over RL steps",
        "Test accuracy over seconds of training (measuring left out)",
        "Change of accuracy at each jump",
        "Multiple of the observed motion that each jump aims at; 1 is no jump. At most 5.4",
    ]
    assert written.missing["Geometry"] == "left out, as --no-geometry asks"


def test_the_command_leaves_the_weights_out_when_asked(cli: Callable[..., Outcome], own_lora_run: LoraRun) -> None:
    journal(own_lora_run.path.parent, {"event": "start", "step": 0})
    done = cli("report", own_lora_run.path.parent, "--no-geometry")
    assert done.code == 0
    assert "not in the report: Geometry: left out, as --no-geometry asks" in done.out


def test_more_than_thirty_jumps_are_grouped(ended: Path) -> None:
    result = json.loads((ended / "result.json").read_text())
    many = jumps(range(20, 250, 2), 10)
    (ended / "result.json").write_text(json.dumps(result | {"jumps": many}))
    (ended / "journal.jsonl").unlink()
    words = read_page(write_report(ended, settings=QUICK).out).words
    assert "115 jumps that were tried, 10 a row" in words
    assert "20 to 38" in words


def test_a_run_that_did_not_end_is_told_from_its_journal_and_metrics(ended: Path) -> None:
    (ended / "result.json").unlink()
    lines = [json_line({"step": step, "reward": 0.2 + step / 100}) for step in range(0, 31, 5)]
    (ended / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 35, "rew')
    journal_lines = (ended / "journal.jsonl").read_text().splitlines()
    (ended / "journal.jsonl").write_text("\n".join(journal_lines[:-1]) + '\n{"event": "ju')
    written = write_report(ended, settings=QUICK)
    seen = read_page(written.out)
    assert "There is no result" in seen.words
    assert "up to step 42" in seen.words
    assert "Reward over RL steps, from 0.200 to 0.500" in seen.pictures
    assert "no accuracies along the run" in written.missing["Accuracy along the run"]


def test_a_folder_with_a_journal_alone_is_a_page_of_reasons(tmp_path: Path) -> None:
    journal(tmp_path, {"event": "start", "step": 0, "schedule": {"observe": 50, "jumps": None}})
    written = write_report(tmp_path)
    seen = read_page(written.out)
    assert "No jump was tried." in seen.words
    assert "observe 50" in seen.words
    assert written.missing["Reward along the run"] == "there is no metrics.jsonl"
    assert written.missing["Geometry"].startswith("there is no folder")
    assert set(written.missing) >= {"Accuracy on the test prompts", "Jumps", "Time", "Config"}


def test_the_weights_are_shown_beside_random_walks_and_by_layer(own_lora_run: LoraRun) -> None:
    folder = own_lora_run.path.parent
    journal(folder, {"event": "start", "step": 0})
    told: list[str] = []
    written = write_report(folder, settings=GeometryOptions(), progress=lambda what, done, total: told.append(what))
    seen = read_page(written.out)
    assert "6 checkpoints of steps 10 to 60" in seen.words
    assert "13 matrices move, 1 do not" in seen.words
    assert "Motion goes straight on" in seen.words
    for start in ("Each figure beside", "Share of the first", "Skill of a straight line", "How far", "Skill of secant"):
        assert any(label.startswith(start) for label in seen.pictures), start
    assert {"predict", "compare"} <= set(told)


def test_too_few_checkpoints_give_reasons(make_lora_run: Callable[..., LoraRun], tmp_path: Path) -> None:
    run = make_lora_run(tmp_path / "run" / "checkpoints", (10,))
    journal(tmp_path / "run", {"event": "start", "step": 0})
    written = write_report(tmp_path / "run")
    words = read_page(written.out).words
    assert "needs 3 checkpoints" in words
    assert "backtest needs at least 2 checkpoints" in written.missing["Skill by layer"]
    shutil.rmtree(run.path)
    run.path.mkdir()
    assert "holds no checkpoints" in write_report(tmp_path / "run").missing["Geometry"]


def test_a_damaged_checkpoint_is_a_reason(own_lora_run: LoraRun) -> None:
    journal(own_lora_run.path.parent, {"event": "start", "step": 0})
    weights = own_lora_run.folder(60) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert str(weights) in write_report(own_lora_run.path.parent).missing["Geometry"]


def test_a_predictor_that_never_acts_says_why(own_lora_run: LoraRun) -> None:
    journal(own_lora_run.path.parent, {"event": "start", "step": 0})
    written = write_report(own_lora_run.path.parent, settings=GeometryOptions(predictor="stay"))
    assert written.missing["Skill by layer"].startswith("stay never acted")


def test_an_unknown_predictor_is_an_error_before_the_work(ended: Path) -> None:
    with pytest.raises(PluginError, match="sekant"):
        write_report(ended, settings=GeometryOptions(predictor="sekant"))
    assert not (ended / "report").exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("result.json", '{"steps": 50', "cannot be read"),
        ("result.json", '{"steps": "fifty"}', "result.json.steps"),
        ("result.json", '{"steps": 5, "curve": [{"step": 1, "test": {"sampled": "high"}}]}', "curve.0.test.sampled"),
        ("journal.jsonl", json_line({"event": "jump", "step": 5}).decode(), "jumps.0.accepted"),
        ("journal.jsonl", "nonsense\n{}\n", "line 1 is damaged"),
    ],
)
def test_damage_is_an_error_that_names_the_file(ended: Path, name: str, text: str, told: str) -> None:
    (ended / name).write_text(text)
    with pytest.raises(CheckpointError, match="restore") as error:
        write_report(ended, settings=QUICK)
    assert told in str(error.value)
    assert str(ended / name) in str(error.value)


def test_a_full_parameter_runs_base_model_is_taken_from_its_config(ended: Path) -> None:
    def base() -> Path | None:
        return Recorded(ended).backbone

    assert base() is None
    config = ended / "config.yaml"
    config.write_text(f"training: {{model: {ended}, lora: null}}")
    assert base() == ended
    config.write_text(f"training: {{model: {ended}, lora: {{rank: 8}}}}")
    assert base() is None
    config.write_text(f"training: {{model: {ended / 'gone'}, lora: null}}")
    assert base() is None
