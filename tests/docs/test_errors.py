"""docs/errors.md has a row for every kind of error, and every error of ours has a kind."""

import ast
import functools
import re

from next_core import errors
from tests.docs.blocks import ROOT

OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = [kind for row in re.findall(r"^- (`[^:]+`):", PAGE, re.MULTILINE) for kind in re.findall(r"`([^`]+)`", row)]


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Every node of the code, and where it is."""
    files = [file for folder in ("next_core", "backends", "predictors") for file in (ROOT / folder).rglob("*.py")]
    return [
        (f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]


def raised() -> list[tuple[str, ast.Call]]:
    """Every place that makes an error of ours."""
    calls = [(where, node) for where, node in nodes() if isinstance(node, ast.Call)]
    return [(where, call) for where, call in calls if isinstance(call.func, ast.Name) and call.func.id in OURS]


def kind_of(call: ast.Call) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == "kind"), None)


def test_every_error_is_made_with_a_kind() -> None:
    without = [
        where for where, call in raised() if kind_of(call) is None and "Interrupted" not in ast.unparse(call.func)
    ]
    assert without == []


def test_the_page_has_a_row_for_every_kind_and_no_other() -> None:
    used = {kind.value for _, call in raised() if isinstance(kind := kind_of(call), ast.Constant)}
    words = {node.value for _, node in nodes() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert sorted(used - set(ROWS)) == []
    assert sorted(set(ROWS) - words) == []
    assert len(ROWS) == len(set(ROWS))
