"""Shared by the tests of the report: pages as a reader of HTML sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})
LINKS = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")


@dataclass
class Seen(HTMLParser):
    """A parsed page: its text, links, ids and tags, and the tags that are not closed in order."""

    page: str
    stack: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.page)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in LINKS:
                self.links.append(str(value))
            if value is not None and key != "id":
                self.links += [part.split(")")[0] for part in value.split("url(")[1:]]

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.text += f"{data} "

    @property
    def words(self) -> str:
        """The text with even white space."""
        return " ".join(self.text.split())

    @property
    def pictures(self) -> list[str]:
        """The descriptions of the plots."""
        return [str(attributes["aria-label"]) for tag, attributes in self.tags if tag == "svg"]


def read_page(path: Path) -> Seen:
    """Read a page and assert what holds for every page: well-formed, self-contained and accessible."""
    seen = Seen(path.read_text(encoding="utf-8"))
    assert seen.problems == []
    assert len(seen.ids) == len(set(seen.ids))
    for link in seen.links:
        assert link.startswith(("#", "data:image/png")), link
        assert not link.startswith("#") or link[1:] in seen.ids, link
    tags = [tag for tag, _ in seen.tags]
    assert not {"script", "link", "iframe", "object", "embed"} & set(tags)
    assert tags.count("table") == tags.count("caption")
    assert tags.count("svg") == tags.count("figcaption") - tags.count("pre")
    assert all(label.strip() for label in seen.pictures)
    assert ("html", {"lang": "en"}) in seen.tags
    assert tags.count("title") == tags.count("h1") == 1
    return seen
