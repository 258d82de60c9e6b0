"""The charts: there, whole, and refused with a reason where there is nothing to draw."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from next_core.diagnostics import Analysis, analyze
from next_core.diagnostics.plots import PICTURES, write_plots
from next_core.drawing import Chart
from tests.diagnostics.runs import history, lora_walks, straight
from tests.predictors.trajectories import dense_run, drift


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(history(lora_walks(3)), draws=40)


def test_every_chart_is_written_as_a_document_of_its_own(analysis: Analysis, tmp_path: Path) -> None:
    told = write_plots(analysis.draw(), tmp_path / "new" / "plots")
    assert told == {name: str(tmp_path / "new" / "plots" / f"{name}.svg") for name in PICTURES}
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == sorted(f"{n}.svg" for n in PICTURES)
    text = (tmp_path / "new" / "plots" / "displacement.svg").read_text()
    for words in ("lag, RL steps", "slope 2: straight line", "random walk"):
        assert words in text
    assert "var(" not in text  # colours that every program knows
    assert ET.fromstring(text).get("width")


def test_what_cannot_be_drawn_says_why() -> None:
    drawn = analyze(history(dense_run({"head.weight": drift(0)}, (10,))), draws=20).draw()
    assert isinstance(drawn["energy-ratios"], Chart)
    for name, words in (("skill", "3 checkpoints"), ("displacement", "4 checkpoints"), ("layers", "layers")):
        assert words in str(drawn[name])


def test_a_single_straight_matrix_is_drawn() -> None:
    drawn = analyze(history(straight()), draws=20).draw()
    assert all(isinstance(one, Chart) and one.svg() for one in drawn.values())
