"""The files that a repository is expected to have, as their readers parse them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from next_core.errors import NextCoreError
from tests.docs.blocks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
FORMS = [path for path in TEMPLATES.glob("*.yml") if path.stem != "config"]


def load(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_hooks_are_the_tools_of_make_lint_from_the_projects_own_environment() -> None:
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    (repo,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    commands = [hook["entry"].split() for hook in repo["hooks"]]
    assert [command[0] for command in commands] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    for command in commands:
        words = command[:2] if command[0].endswith("ruff") else command[:1]
        assert " ".join(words).replace(".venv", "$(VENV)").replace("$(VENV)/bin", "$(BIN)") in lint
    for hook in repo["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys()


def test_the_citation_is_of_this_software_and_of_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The next-core authors"}]
    assert citation["abstract"] == PROJECT["description"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something_and_names_every_field_once(form: Path) -> None:
    found = load(form)
    assert {"name", "description", "body"} <= found.keys()
    fields = [item for item in found["body"] if item["type"] != "markdown"]
    ids = [item["id"] for item in fields]
    assert len(ids) == len(set(ids))
    assert any(item.get("validations", {}).get("required") for item in fields)
    assert all(item["attributes"]["label"] for item in fields)


def test_the_targets_the_pages_speak_of_are_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("setup", "quickstart", "test", "lint", "docs", "tables", "pictures"):
        assert f"\n{target}: " in makefile
    assert "make docs" in (ROOT / ".ci" / "run").read_text()


def test_every_error_of_ours_has_a_code_of_its_own() -> None:
    codes = [cls.exit_code for cls in NextCoreError.__subclasses__() if "exit_code" in vars(cls)]
    assert len(codes) == len(set(codes))
    assert 1 not in codes
