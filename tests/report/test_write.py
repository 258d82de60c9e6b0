"""`next-core report` from the command line: where the page goes, what is refused, and that nothing else is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from next_core.diagnostics.drawing import Drawing, draw, label
from next_core.report.page import inline
from tests.conftest import Outcome
from tests.report.conftest import read_page
from tests.report.made import comparison, write_comparison


@pytest.fixture
def race(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "race", comparison(seeds=2))


def test_the_page_goes_into_the_folder_and_the_command_says_where(cli: Callable[..., Outcome], race: Path) -> None:
    done = cli("report", race)
    assert done.code == 0
    assert "beat plain RL" in done.out
    assert f"report: {race / 'report' / 'index.html'}" in done.out
    assert [path.name for path in (race / "report").iterdir()] == ["index.html"]
    read_page(race / "report" / "index.html")


def test_out_and_figures_and_json(cli: Callable[..., Outcome], race: Path, tmp_path: Path) -> None:
    done = cli("report", race, "--out", tmp_path / "new" / "a.html", "--figures", tmp_path / "pictures", "--json")
    assert done.code == 0
    told = json.loads(done.out)
    assert told["kind"] == "comparison"
    assert told["out"] == str(tmp_path / "new" / "a.html")
    names = {"curves-over-steps", "curves-over-seconds", "differences", "multiples"}
    assert set(told["figures"]) == names
    files = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert not (race / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("{there}", "--out", "{there}"), "ends in .html"),
        (("{there}", "--out", "{there}/compare.json"), "ends in .html"),
        (("{there}", "--figures", "{there}/compare.json"), "name a folder for the plots"),
        (("{there}/nowhere",), "is not a folder"),
        (("{there}/empty",), "neither a run"),
        (("{there}/run/checkpoints",), "did you mean {there}/run?"),
        (("{there}", "--cache", "x", "--no-cache"), "contradict"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    cli: Callable[..., Outcome], race: Path, arguments: tuple[str, ...], told: str
) -> None:
    (race / "empty").mkdir()
    (race / "run" / "checkpoints").mkdir(parents=True)
    (race / "run" / "journal.jsonl").write_text("")
    before = (race / "compare.json").read_text()
    done = cli("report", *(argument.format(there=race) for argument in arguments))
    assert done.code == 2
    assert told.format(there=race) in done.err
    assert (race / "compare.json").read_text() == before


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure"])
def test_without_the_extra_the_error_names_it(
    cli: Callable[..., Outcome], race: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = cli("report", race)
    assert done.code == 5
    assert "pip install next-core[report]" in done.err


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    cli: Callable[..., Outcome], race: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("report", race).code == 0
    page = race / "report" / "index.html"
    before = page.read_bytes()

    def full(self: Path, text: str, *_: object, **__: object) -> int:
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert cli("report", race).code == 7
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_names_are_fit_for_a_picture() -> None:
    assert label("a\x00\x1b b\n") == "a b"
    assert label("_hidden from legends") == " _hidden from legends"
    assert label("x" * 100) == "x" * 27 + "…"
    assert label("") == "(no name)"


def test_an_inlined_picture_has_ids_of_its_own_and_points_to_them() -> None:
    def paint(picture: object) -> None:
        from matplotlib.figure import Figure

        assert isinstance(picture, Figure)
        picture.subplots().plot([0, 1], marker="o", label='id="x" $\\bad$')
        picture.legend()

    drawn = [draw(name, (3, 2), paint) for name in ("a", "b")]
    texts = [inline(one.svg(), one.name, "what <it> shows") for one in drawn if isinstance(one, Drawing)]
    assert len(texts) == 2
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in texts]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text in texts:
        assert "what &lt;it&gt; shows" in text
        assert 'id="x" $\\bad$' in text
        assert "<style" not in text
        assert "<metadata" not in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_it(cli: Callable[..., Outcome], race: Path, tmp_path: Path) -> None:
    cli("report", race)
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (race / "report" / "index.html").as_uri()
    done = subprocess.run(
        ["chromium", *flags, f"--screenshot={shot}", page], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert b"Content Security Policy" not in done.stderr
