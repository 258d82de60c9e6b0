"""The pictures: there, whole, and refused with the remedy where matplotlib is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from next_core.diagnostics import Analysis, analyze
from next_core.diagnostics.drawing import Drawing, check_drawing
from next_core.diagnostics.plots import PICTURES, write_plots
from tests.diagnostics.runs import history, lora_walks, straight
from tests.errors import raises_kind
from tests.predictors.trajectories import dense_run, drift

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(history(lora_walks(3)), draws=40)


def test_every_picture_is_written_as_png_and_svg_and_nothing_else_is_left(analysis: Analysis, tmp_path: Path) -> None:
    told = write_plots(analysis.draw(), tmp_path / "new" / "plots")
    assert told == {name: str(tmp_path / "new" / "plots" / f"{name}.png") for name in PICTURES}
    files = sorted(path.name for path in (tmp_path / "new" / "plots").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg"))
    for path in (tmp_path / "new" / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "new" / "plots" / "displacement.svg").read_text()
    for words in ("lag, RL steps", "slope 2: straight line", "random walk, mean and 95%"):
        assert words in text


def test_the_same_analysis_makes_the_same_pictures(analysis: Analysis) -> None:
    first, again = analysis.draw(), analysis.draw()
    for name, one in first.items():
        other = again[name]
        assert isinstance(one, Drawing)
        assert isinstance(other, Drawing)
        assert one.svg() == other.svg(), name


def test_what_cannot_be_drawn_says_why() -> None:
    drawn = analyze(history(dense_run({"head.weight": drift(0)}, (10,))), draws=20).draw()
    assert isinstance(drawn["energy-ratios"], Drawing)
    for name, words in (("skill", "3 checkpoints"), ("displacement", "4 checkpoints"), ("layers", "layers")):
        assert words in str(drawn[name])


def test_a_single_straight_matrix_is_drawn_without_a_warning() -> None:
    drawn = analyze(history(straight()), draws=20).draw()
    assert all(isinstance(one, Drawing) and one.svg() for one in drawn.values())


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with raises_kind("config-missing-package", "next-core[report]"):
        check_drawing(tmp_path)


def test_a_file_in_the_folders_place_is_refused(analysis: Analysis, tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("")
    with raises_kind("config-invalid-value", "plots"):
        write_plots(analysis.draw(), tmp_path / "plots")
