"""``next-core analyze``."""

import json

import pytest

from next_core.cli.analyze_command import COLUMNS
from next_core.cli.options import SourceOptions
from next_core.diagnostics import FIGURES
from next_core.interfaces import CheckpointSource
from next_core.sources.memory import MemorySource
from next_core.storage.json_lines import json_line
from tests.cli.conftest import assert_fails, facts
from tests.conftest import STEPS, Cli, LoraRun, Outcome
from tests.diagnostics.runs import FIFTEEN, name, straight, walks


@pytest.fixture
def analyze(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``analyze(folder or source in memory, *options)``."""

    def run(given: object, *options: object) -> Outcome:
        if isinstance(given, CheckpointSource):
            monkeypatch.setattr(SourceOptions, "source", lambda self: given)
        return cli("analyze", "--checkpoints", given, "--no-cache", "--draws", 20, *options)

    return run


def test_a_lora_run_is_described_in_tables(analyze: Cli, lora_run: LoraRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = analyze(lora_run.path).out
    assert "13 matrices" in shown
    assert "model.layers.1.self_attn.k_proj.weight" in shown
    for figure in ("energy_ratio_global", "c1_r2", "pinned_skill", "cosine_local", "msd_exponent"):
        assert FIGURES[figure].heading in shown
    assert "- " in shown
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.split("frozen:")[0].splitlines() if "  " in line)


def test_with_json_standard_output_is_one_object_and_tables_go_to_stderr(analyze: Cli, lora_run: LoraRun) -> None:
    outcome = analyze(lora_run.path, "--horizon", 20, "--json")
    found = facts(outcome)
    assert (found["layout"], found["steps"], found["horizon"]) == ("peft-adapter", list(STEPS), 20)
    assert set(found["kinds"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(found["per_matrix"]) == 13
    assert found["overall"]["figures"]["energy_ratio_global"]["value"] > 0
    assert "By kind" in outcome.err


@pytest.mark.parametrize(
    ("option", "spectrum"), [((), False), (("--no-spectrum",), False), (("--spectrum",), True)], ids=str
)
def test_a_full_run_has_its_spectrum_on_request(analyze: Cli, option: tuple[str, ...], spectrum: bool) -> None:
    figures = facts(analyze(walks(2, m=30, n=20), *option, "--json"))["overall"]["figures"]
    assert figures["squared_energy_ratio_global"]["value"] is not None
    assert (figures["energy_ratio_global"]["value"] is not None) == spectrum


def test_the_second_table_has_a_row_for_each_kind(analyze: Cli) -> None:
    _, headings, row, *_ = analyze(walks(3)).out.split("By kind: ")[1].splitlines()
    assert all(heading in headings for heading in COLUMNS.values())
    assert row.split()[:2] == ["q_proj", "3"]


def test_a_run_without_a_backbone_or_with_one_checkpoint_is_described_as_far_as_possible(analyze: Cli) -> None:
    whole = straight()
    weights = {step: whole._value(name(0), step) for step in FIFTEEN}
    without = facts(analyze(MemorySource({t: {name(0): weights[t]} for t in FIFTEEN}), "--json"))
    assert without["origin"] == 10
    assert any("step 10" in note for note in without["notes"])
    one = facts(analyze(MemorySource({10: {name(0): weights[10]}}, whole._backbone), "--json"))
    assert "3 checkpoints" in one["missing"]["line_skill"]


def test_plots_are_listed_and_a_wrong_place_fails_before_the_work(
    analyze: Cli, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("plots")
    monkeypatch.setattr("next_core.diagnostics.plots.write_plots", lambda analysis, out: {"skill": str(out)})
    assert facts(analyze(walks(2), "--plots", folder, "--json"))["plots"] == {"skill": str(folder)}
    (folder / "file").write_text("")
    assert_fails(analyze(walks(2), "--plots", folder / "file"), 2, "config-folder-not-empty", folder / "file")


def test_a_compressor_without_a_spectrum_contradicts_it(analyze: Cli) -> None:
    outcome = analyze(walks(2), "--spectrum", "--compressor", "lanczos")
    assert_fails(outcome, 2, "config-contradiction", "--spectrum", "lanczos")


def test_the_jumps_of_a_run_folder_count_in_the_learning_rate(analyze: Cli, own_lora_run: LoraRun) -> None:
    alone = facts(analyze(own_lora_run.path, "--json"))["learning_rate"]
    assert (alone["multiple"], alone["jumps"]) == (None, 0)
    jump = {"event": "jump", "step": 20, "accepted": True, "diagnostics": {"multiple": 3.0, "measured": 20.0}}
    (own_lora_run.path.parent / "journal.jsonl").write_bytes(json_line(jump))
    found = facts(analyze(own_lora_run.path, "--json"))
    assert (found["learning_rate"]["multiple"], found["learning_rate"]["jumps"]) == (3.0, 1)
    assert found["learning_rate"]["factor"] == pytest.approx(3 * alone["factor"])
    assert "3.0" in json.dumps(found["advice"])
