"""``next-core report``: where the page goes, and what is refused."""

import sys
from pathlib import Path

import pytest

from tests.cli.conftest import assert_fails, facts
from tests.conftest import Cli
from tests.report.conftest import read_page
from tests.report.made import arm, comparison, write_comparison


@pytest.fixture
def race(tmp_path: Path) -> Path:
    found = comparison(seeds=1)
    return write_comparison(tmp_path / "race", found | {"arms": {"plain": arm({0: 0.5}, {0: 0.5}, role="plain")}})


def test_the_page_goes_into_the_folder_and_the_command_says_where(cli: Cli, race: Path) -> None:
    done = cli("report", race)
    assert done.code == 0
    assert str(race / "report" / "index.html") in done.out
    assert "not in the report: Jumps" in done.out
    assert [path.name for path in (race / "report").iterdir()] == ["index.html"]
    read_page(race / "report" / "index.html")


def test_out_figures_and_json(cli: Cli, race: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.html"
    found = facts(cli("report", race, "--out", out, "--figures", tmp_path / "plots", "--json"))
    assert found.keys() == {"kind", "out", "summary", "figures", "missing"}
    assert (found["kind"], found["out"]) == ("comparison", str(out))
    names = {"curves-over-steps", "curves-over-seconds"}
    assert set(found["figures"]) == names
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}.svg" for name in names}
    assert out.exists()
    assert not (race / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        (("{there}", "--out", "{there}"), "config-invalid-value", "{there}"),
        (("{there}", "--out", "{there}/compare.json"), "config-invalid-value", "{there}/compare.json"),
        (("{there}", "--out", "{there}/compare.json/a.html"), "config-folder-not-empty", "{there}/compare.json"),
        (("{there}", "--figures", "{there}/compare.json"), "config-folder-not-empty", "{there}/compare.json"),
        (("{there}/nowhere",), "report-unknown-folder", "{there}/nowhere"),
        (("{there}/empty",), "report-unknown-folder", "{there}/empty"),
        (("{there}/run/checkpoints",), "report-unknown-folder", "did you mean {there}/run?"),
    ],
)
def test_a_mistake_changes_nothing(cli: Cli, race: Path, arguments: tuple[str, ...], kind: str, name: str) -> None:
    (race / "empty").mkdir()
    (race / "run" / "checkpoints").mkdir(parents=True)
    (race / "run" / "journal.jsonl").write_text("")
    before = (race / "compare.json").read_text()
    done = cli("report", *(argument.format(there=race) for argument in arguments))
    assert_fails(done, 2, kind, name.format(there=race))
    assert (race / "compare.json").read_text() == before


def test_a_missing_extra_is_named(cli: Cli, race: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert_fails(cli("report", race), 2, "config-missing-package", "next-core[report]")
