"""Shared by the tests of the report: pages as a tree of elements."""

import base64
import hashlib
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

SVG = "{http://www.w3.org/2000/svg}"
LINKS = ("src", "href", "{http://www.w3.org/1999/xlink}href", "action", "data", "poster", "srcset")


@dataclass(frozen=True)
class Seen:
    """A page, its text with even white space, and the descriptions of its plots."""

    page: str
    words: str
    pictures: list[str]


def read_page(path: Path) -> Seen:
    """Read a page and assert what holds for every page: well-formed, self-contained and accessible."""
    page = path.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    root = ET.fromstring(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL).removeprefix("<!DOCTYPE html>"))
    elements, attributes = list(root.iter()), [item for element in root.iter() for item in element.items()]
    ids = [value for key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    links = [value for key, value in attributes if key in LINKS]
    links += [part.split(")")[0] for key, value in attributes if key != "id" for part in value.split("url(")[1:]]
    for link in links:
        assert link.startswith(("#", "data:image/png")), link
        assert not link.startswith("#") or link[1:] in ids, link
    tags = [element.tag for element in elements]
    assert not {"script", "link", "iframe", "object", "embed"} & set(tags)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(digests) == 1  # ours, which the page's policy names
    assert f"script-src 'sha256-{digests[0]}'" in page
    assert tags.count("table") == tags.count("caption")
    assert tags.count(f"{SVG}svg") == 2 * tags.count("figcaption")  # for a screen and a phone
    assert root.get("lang") == "en"
    assert tags.count("title") == tags.count("h1") == 1
    pictures = [element.get("aria-label", "") for element in elements if element.tag == f"{SVG}svg"][::2]
    for element in elements:
        if element.tag in ("style", f"{SVG}svg"):
            element.clear()
    assert all(label.strip() for label in pictures)
    return Seen(page, " ".join(" ".join(root.itertext()).split()), pictures)
