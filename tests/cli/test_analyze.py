"""`next-core analyze`, as the command that the console script calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from next_core.cli.analyze_command import COLUMNS, analyze_command
from next_core.cli.options import RunOptions
from next_core.diagnostics import FIGURES
from next_core.errors import ConfigError
from next_core.interfaces import CheckpointSource
from next_core.sources.memory import MemorySource
from next_core.storage.json_lines import json_line
from tests.conftest import STEPS, LoraRun, Outcome
from tests.diagnostics.runs import FIFTEEN, name, straight, walks


@dataclass(frozen=True)
class Recorded(RunOptions):
    """A run whose checkpoints are in memory."""

    memory: CheckpointSource | None = None

    def source(self) -> CheckpointSource:
        assert self.memory is not None
        return self.memory


@pytest.fixture
def analyzed(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """``analyzed(folder or source, ...)``: standard output and standard error."""

    def run(given: Path | CheckpointSource, **options: Any) -> tuple[str, str]:
        capsys.readouterr()
        known = isinstance(given, Path)
        recorded = (
            RunOptions([given], no_cache=True) if known else Recorded([Path("memory")], no_cache=True, memory=given)
        )
        analyze_command(recorded, **options)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def refuse(constant: str) -> None:
    raise ValueError(constant)


def test_a_lora_run_is_described_in_tables_and_sentences(
    analyzed: Callable[..., tuple[str, str]], lora_run: LoraRun
) -> None:
    out, _ = analyzed(lora_run.path, by="layer")
    assert "evenly spaced, counted from step 0; 13 matrices move, 1 do not" in out
    assert "frozen: model.layers.1.self_attn.k_proj.weight: did not move since step 50" in out
    for figure in ("energy_ratio_global", "c1_r2", "pinned_skill", "cosine_local", "msd_exponent"):
        assert FIGURES[figure].heading in out
    assert "By layer: median" in out
    assert "- Motion goes straight on: median cosine" in out


def test_with_json_the_last_line_is_one_strict_object_and_tables_go_to_standard_error(
    analyzed: Callable[..., tuple[str, str]], lora_run: LoraRun
) -> None:
    out, err = analyzed(lora_run.path, as_json=True)
    assert len(out.splitlines()) == 1
    found = json.loads(out, parse_constant=refuse)
    assert (found["layout"], found["steps"]) == ("peft-adapter", list(STEPS))
    assert set(found["kinds"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(found["per_matrix"]) == 13
    assert found["overall"]["figures"]["energy_ratio_global"]["value"] > 0
    assert "By kind: median" in err


def test_a_full_run_keeps_to_the_squared_ratio_unless_the_spectrum_is_asked_for(
    analyzed: Callable[..., tuple[str, str]],
) -> None:
    for spectrum, known in ((None, False), (False, False), (True, True)):
        out, _ = analyzed(walks(2, m=30, n=20), spectrum=spectrum, as_json=True)
        figures = json.loads(out)["overall"]["figures"]
        assert figures["squared_energy_ratio_global"]["value"] is not None
        assert (figures["energy_ratio_global"]["value"] is not None) == known


@pytest.mark.parametrize("by", ["layer", "kind", "matrix"])
def test_the_table_is_of_what_was_asked_for(analyzed: Callable[..., tuple[str, str]], by: str) -> None:
    out, _ = analyzed(walks(3), by=by)
    title, heads, *rows = out.split(f"By {by}: ")[1].splitlines()
    assert "above, ↓ below the random walk's 95%" in title
    assert heads.split()[-1] == "speed"
    assert all(heading in heads for heading in COLUMNS.values())
    labels = {"layer": ["0", "1", "2"], "kind": ["q_proj"], "matrix": [f"{i}.self_attn.q_proj" for i in range(3)]}[by]
    assert [row.split()[0] for row in rows[: len(labels)]] == labels
    assert not rows[len(labels)].startswith(labels[0][-6:])


@pytest.mark.parametrize("by", ["layer", "kind", "matrix"])
def test_no_number_is_cut_short_on_a_narrow_terminal(
    analyzed: Callable[..., tuple[str, str]], lora_run: LoraRun, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out, _ = analyzed(lora_run.path, by=by)
    tables = out.split("frozen:")[0].splitlines()
    assert "…" not in out
    assert all(len(line) <= 80 for line in tables if "  " in line)


def test_a_run_without_its_backbone_or_with_one_checkpoint_is_described_as_far_as_it_goes(
    analyzed: Callable[..., tuple[str, str]],
) -> None:
    whole = straight()
    lost = MemorySource({t: {name(0): whole._value(name(0), t)} for t in FIFTEEN})
    out, _ = analyzed(lost)
    assert "note: no backbone: deltas count from the first checkpoint, step 10" in out
    one = MemorySource({10: {name(0): whole._value(name(0), 10)}}, whole._backbone)
    out, _ = analyzed(one)
    assert "- Only 1 checkpoint: no out-of-sample figures (needs 3 checkpoints" in out


def test_plots_are_listed_and_a_bad_place_is_refused_before_the_work(
    analyzed: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, _ = analyzed(walks(2), plots=tmp_path / "plots", as_json=True)
    assert json.loads(out)["plots"]["skill"] == str(tmp_path / "plots" / "skill.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        analyzed(walks(2), plots=tmp_path / "file")


def test_the_console_script_has_the_command(cli: Callable[..., Outcome], lora_run: LoraRun) -> None:
    outcome = cli("analyze", "--checkpoints", lora_run.path, "--no-cache", "--by", "matrix", "--horizon", 20, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out.splitlines()[-1], parse_constant=refuse)["horizon"] == 20
    assert "By matrix" in outcome.err
    assert cli("analyze", "--checkpoints", lora_run.path, "--by", "colour").code == 2


def test_an_unknown_table_is_refused(analyzed: Callable[..., tuple[str, str]]) -> None:
    with pytest.raises(ConfigError, match="--by is one of layer, kind, matrix"):
        analyzed(walks(2), by="colour")


def test_the_jumps_of_a_run_folder_are_in_its_advice(
    analyzed: Callable[..., tuple[str, str]], own_lora_run: LoraRun
) -> None:
    alone = json.loads(analyzed(own_lora_run.path, as_json=True)[0])["learning_rate"]
    assert (alone["multiple"], alone["jumps"]) == (None, 0)
    jump = {"event": "jump", "step": 20, "accepted": True, "diagnostics": {"multiple": 3.0, "measured": 20.0}}
    (own_lora_run.path.parent / "journal.jsonl").write_bytes(json_line(jump))
    out, err = analyzed(own_lora_run.path, as_json=True)
    found = json.loads(out)["learning_rate"]
    assert (found["multiple"], found["jumps"]) == (3.0, 1)
    assert found["factor"] == pytest.approx(3 * alone["factor"])
    assert "auto multiplied its steps by 3.0" in err
