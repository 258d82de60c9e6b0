"""The example of a plug-in as its author and its user have it: a package of its own beside an installed next-core."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Environment, call

pytestmark = pytest.mark.packaging
NAMES = {"last-step", "parabola"}


@pytest.fixture(scope="module")
def with_plugin(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """The environment with the plug-in in it, and the examples as a user copies them."""
    examples = tmp_path_factory.mktemp("copied") / "examples"
    shutil.copytree(ROOT / "examples", examples, ignore=shutil.ignore_patterns("__pycache__"))
    installed.install(f"{examples / 'plugin'}[test]")
    return installed, examples / "plugin"


def test_the_kit_needs_no_pytest(installed: Environment, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["pytest"] = None  # as if it were not there
from next_core import make_predictor
from next_core.testing import check_predictor
check_predictor(make_predictor("secant"))
"""
    call(installed.python, "-c", code, cwd=tmp_path)


def test_its_own_tests_pass(with_plugin: tuple[Environment, Path]) -> None:
    environment, folder = with_plugin
    said = call(environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder).stdout
    assert " passed" in said.splitlines()[-1]
    assert "failed" not in said


def test_its_names_are_listed_and_in_the_schema(with_plugin: tuple[Environment, Path], tmp_path: Path) -> None:
    environment, _ = with_plugin
    listed = json.loads(call(environment.next_core, "plugins", "--json", cwd=tmp_path).stdout)["plugins"]
    ours = {entry["name"]: entry["status"] for entry in listed if entry["distribution"] == "curved-steps"}
    assert ours == dict.fromkeys(NAMES, "ok")
    schema = json.loads(call(environment.next_core, "schema", cwd=tmp_path).stdout)
    (names, *_) = (option["enum"] for option in schema["properties"]["predictor"]["anyOf"] if "enum" in option)
    assert set(names) >= NAMES


def test_a_config_can_name_it_and_gets_the_schedule_it_is_made_for(
    with_plugin: tuple[Environment, Path], tmp_path: Path
) -> None:
    environment, folder = with_plugin
    command = ("run", folder / "run.yaml", "--out", tmp_path / "run", "--dry-run", "--json")
    said = call(environment.next_core, *command, cwd=tmp_path).stdout
    assert "parabola" in said
    code = "from next_core.config import load_config; import sys; print(load_config(sys.argv[1]).schedule.every)"
    assert call(environment.python, "-c", code, folder / "run.yaml", cwd=tmp_path).stdout.strip() == "5"
