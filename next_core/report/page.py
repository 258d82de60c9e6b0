"""What a page is made of, and how it becomes HTML. Whatever text comes from a run is escaped by the template."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from next_core.diagnostics.drawing import Drawing
from next_core.errors import PluginError

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What HTML, or UTF-8, does not take."""
DROPPED = (f"{{{SVG}}}metadata", f"{{{SVG}}}style")


@dataclass(frozen=True)
class Text:
    """A paragraph; an ``aside`` is smaller, for what explains."""

    text: str
    aside: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Bullets:
    """Sentences that stand beside each other."""

    items: Sequence[str]
    kind: Literal["bullets"] = "bullets"


@dataclass(frozen=True)
class Cell:
    """What a table shows at one place: a figure, and its interval or a remark in small. ``share`` draws a bar."""

    text: str
    small: str = ""
    share: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the columns whose heading is in ``words`` hold words, the others numbers."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[str] = ()
    notes: Sequence[str] = ()
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Picture:
    """A drawing, its caption, and what it shows in words for who cannot see it."""

    drawing: Drawing
    caption: str
    description: str
    kind: Literal["picture"] = "picture"

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width."""
        return bool(self.drawing.picture.get_figwidth() > 7)

    @property
    def markup(self) -> Markup:
        from markupsafe import Markup

        return Markup(inline(self.drawing.svg(), self.drawing.name, self.description))


@dataclass(frozen=True)
class Code:
    """Text as it was written, such as a config."""

    text: str
    caption: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    items: Sequence[tuple[str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Missing:
    """One line on what could not be made, and why."""

    what: str
    why: str
    kind: Literal["missing"] = "missing"


Single = Text | Bullets | Table | Picture | Code | Facts | Missing


@dataclass(frozen=True)
class Columns:
    """What stands in two columns where there is room, filled from the top left."""

    blocks: Sequence[Single]
    kind: Literal["columns"] = "columns"


Block = Single | Columns


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """One main figure, large."""

    figure: str
    words: str


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    summary: Sequence[str]
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()

    def blocks(self) -> Iterator[Single]:
        """Everything below the headings, in order."""
        for section in self.sections:
            for block in section.blocks:
                yield from block.blocks if isinstance(block, Columns) else (block,)

    def drawings(self) -> list[Drawing]:
        """Every picture, in order."""
        return [block.drawing for block in self.blocks() if isinstance(block, Picture)]

    def missing(self) -> dict[str, str]:
        """What could not be made, and why."""
        return {block.what: block.why for block in self.blocks() if isinstance(block, Missing)}

    def html(self) -> str:
        """The page, complete in itself. Raises ``PluginError`` without jinja2."""
        text = _environment().get_template("page.html").render(page=self, version=version("next-core"))
        return UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def check_html() -> None:
    """Raise ``PluginError`` without jinja2."""
    _environment()


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise PluginError(f"a report needs jinja2 ({error}); pip install next-core[report]") from error
    return Environment(
        loader=PackageLoader("next_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inline(svg: str, name: str, description: str) -> str:
    """An SVG document as an element of a page: ids are its own, size is the page's, nothing points outside."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in DROPPED]:
            parent.remove(child)
    used = {value[1:] for element in root.iter() if (value := element.get(HREF, "")).startswith("#")}
    used |= {value[5:-1] for element in root.iter() for value in element.attrib.values() if value.startswith("url(#")}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif key == HREF and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{name}-{value[5:]}")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", description)
    return ET.tostring(root, encoding="unicode")
