"""docs/errors.md: what it quotes is what the code says."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`.+?) \| .+ \| .+ \|$", PAGE, re.MULTILINE)
HOLE = "\0"


def text_of(node: ast.expr) -> str | None:
    """A string as it is shown, with a mark for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp):
        return (text_of(node.left) or HOLE) + (text_of(node.right) or HOLE)
    return None


def strings() -> Iterator[str]:
    for folder in ("next_core", "backends", "predictors"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                found = text_of(node) if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) else None
                if found:
                    yield found


@functools.cache
def all_strings() -> frozenset[str]:
    return frozenset(strings())


def says(text: str, parts: list[str]) -> bool:
    """Whether a message has all of the parts, in this order."""
    at = 0
    for part in parts:
        at = text.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def test_the_page_has_messages_of_every_kind() -> None:
    assert len(ROWS) > 50
    assert re.findall(r"exit code (\d)", PAGE) == ["2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize("row", ROWS)
def test_a_quoted_message_is_one_of_the_codes(row: str) -> None:
    parts = re.findall(r"`([^`]+)`", row)
    assert re.sub(r"`[^`]+`", "", row).replace("...", "").strip() == "", "only code and ... stand in this column"
    assert any(says(text, parts) for text in all_strings()), f"no message says {' ... '.join(parts)}"
