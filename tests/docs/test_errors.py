"""docs/errors.md has a row for every kind of error, and every error of ours has a kind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from next_core import errors
from tests.docs.blocks import ROOT

OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
ROWS = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)


def raised() -> Iterator[tuple[str, ast.Call]]:
    """Every construction of an error of ours, and where it is."""
    for folder in ("next_core", "backends", "predictors"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OURS:
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def kind_of(call: ast.Call) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == "kind"), None)


def test_every_error_is_raised_with_a_kind() -> None:
    assert [where for where, call in raised() if call.func.id != "Interrupted" and kind_of(call) is None] == []  # type: ignore[attr-defined]


def test_the_page_has_a_row_for_every_kind_and_no_other() -> None:
    named = {kind.value for _, call in raised() if isinstance(kind := kind_of(call), ast.Constant)}
    defaults = {vars(errors)[name].default_kind for name in OURS}
    assert set(ROWS) >= named
    assert set(ROWS) <= named | defaults | _literals()
    assert len(ROWS) == len(set(ROWS))


def _literals() -> set[str]:
    """Kinds that are chosen by a function and not written at the raise."""
    text = (ROOT / "next_core" / "settings.py").read_text(encoding="utf-8")
    return set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', text))
