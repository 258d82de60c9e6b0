"""The pictures: there, whole, and refused with the remedy where matplotlib is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from next_core.diagnostics import Analysis, analyze
from next_core.diagnostics.drawing import check_drawing
from next_core.diagnostics.plots import PICTURES, write_plots
from next_core.errors import ConfigError, PluginError
from tests.diagnostics.runs import history, lora_walks, straight
from tests.predictors.trajectories import dense_run, drift

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(history(lora_walks(3)))


def test_every_picture_is_written_as_png_and_svg_and_nothing_else_is_left(analysis: Analysis, tmp_path: Path) -> None:
    told = write_plots(analysis, tmp_path / "new" / "plots")
    assert told == {name: str(tmp_path / "new" / "plots" / f"{name}.png") for name in PICTURES}
    files = sorted(path.name for path in (tmp_path / "new" / "plots").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg"))
    for path in (tmp_path / "new" / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "new" / "plots" / "displacement.svg").read_text()
    for words in ("lag, RL steps", "slope 2: straight line", "random walk, mean and 95%"):
        assert words in text


def test_the_same_analysis_makes_the_same_files(analysis: Analysis, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_plots(analysis, tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    told = write_plots(analyze(history(dense_run({"head.weight": drift(0)}, (10,)))), tmp_path)
    assert told["skill"].startswith("not drawn: needs 3 checkpoints")
    assert told["displacement"].startswith("not drawn: needs 4 checkpoints")
    assert "which tell layers" in told["layers"]
    assert told["energy-ratios"].endswith(".png")


def test_a_single_straight_matrix_is_drawn_without_a_warning(tmp_path: Path) -> None:
    assert all(path.endswith(".png") for path in write_plots(analyze(history(straight())), tmp_path).values())


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PluginError, match=r"pip install next-core\[report\]"):
        check_drawing(tmp_path)


def test_a_file_in_the_folders_place_is_refused(analysis: Analysis, tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_plots(analysis, tmp_path / "plots")
