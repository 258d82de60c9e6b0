"""A page: what its template shows, and how it becomes one self-contained HTML file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from next_core.diagnostics.drawing import WIDTH, Drawing, draw
from next_core.process.optional_packages import import_optional
from next_core.report import formatting

if TYPE_CHECKING:
    from markupsafe import Markup

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML or UTF-8 cannot hold."""
DROPPED = (f"{{{SVG}}}metadata", f"{{{SVG}}}style")
WIDE = 7
"""A wider drawing, in inches, takes the whole width of the page."""


@dataclass
class Page:
    """The values that a template shows; ``missing`` names what could not be made, with the reason."""

    template: str
    title: str
    subtitle: str
    summary: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    """The main figures, each with its label."""
    sections: Mapping[str, str]
    """Ids and titles."""
    facts: dict[str, Any] = field(default_factory=dict)
    drawings: dict[str, Drawing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def draw(self, name: str, height: float, paint: Callable[..., str | None], *facts: Any, what: str = "") -> None:
        """Draw ``paint(picture, *facts)``, or else give its reason as the one why ``what`` is missing."""
        self.keep(name, draw(name, (WIDTH, height), paint, *facts), what)

    def keep(self, name: str, drawn: Drawing | str, what: str = "") -> None:
        """Keep a drawing, or the reason why there is none."""
        if isinstance(drawn, Drawing):
            self.drawings[name] = drawn
        elif what:
            self.missing[what] = drawn

    def html(self) -> str:
        """Return the page. Raises ``ConfigError`` without jinja2."""
        values = vars(self) | self.facts | {"version": version("next-core")}
        text = make_environment().get_template(self.template).render(values)
        return UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def make_environment() -> Any:
    """Return the templates and the functions that they use. Raises ``ConfigError`` without jinja2."""
    jinja2 = import_optional("jinja2", "report")
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("next_core.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {name: value for name, value in vars(formatting).items() if callable(value)}
    made.globals |= {"NONE": formatting.NONE, "markup": markup}
    made.globals["is_wide"] = lambda drawing: drawing.picture.get_figwidth() > WIDE
    return made


def markup(drawing: Drawing, description: str) -> Markup:
    """Return a drawing as an element of a page; ``description`` tells what it shows to those who cannot see it."""
    from markupsafe import Markup

    return Markup(inline(drawing.svg(), drawing.name, description))


def inline(svg: str, name: str, description: str) -> str:
    """Return an SVG document as an element: its ids begin with ``name``, the page sets its size, it links nowhere."""
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
