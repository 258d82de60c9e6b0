"""A page: sections of text, tables and charts, and how they become one self-contained HTML file."""

import base64
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from next_core.drawing import Chart
from next_core.drawing.elements import COLOURS, DARK, LIGHT, NARROW, WIDTH, label
from next_core.process.optional_packages import import_optional

UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML or UTF-8 cannot hold."""
MOST_ROWS = 10  # A longer table is folded
MOST_SERIES = 40
WHOLE = 1060  # Width in pixels of a chart that takes the whole page
NUMBER = re.compile(r"[−+≥≤ ]*[\d.,]+%?( (s|min|h)( less| more)?| [↑↓])?|–|")


@dataclass(frozen=True)
class Cell:
    """A cell of a table; ``small`` stands below the text."""

    text: str
    small: str = ""
    strong: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Text:
    """A paragraph, or with several sentences a list."""

    sentences: Sequence[str]
    look: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    main: bool = False
    """Whether it is never folded."""

    @property
    def folded(self) -> bool:
        return len(self.rows) > MOST_ROWS and not self.main

    @property
    def words(self) -> list[bool]:
        """Whether each column holds words rather than numbers."""
        return [any(not NUMBER.fullmatch(str(cell)) for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Figure:
    """A chart with a caption; ``description`` says what it shows to those who cannot see it."""

    chart: Chart
    caption: str
    description: str = ""
    whole: bool = False

    @property
    def drawn(self) -> Mapping[str, str]:
        """The chart for a screen and for a phone."""
        about = self.description or self.caption
        width = WHOLE if self.whole else WIDTH
        return {"screen": self.chart.svg(width, about), "phone": self.chart.svg(NARROW, about)}

    @property
    def keys(self) -> Mapping[str, Mapping[str, Any]]:
        return {label(name, 60): {"dashed": False} | dict(look) for name, look in self.chart.keys().items()}


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    pairs: Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Code:
    """A text shown as it is, folded where it is long."""

    caption: str
    text: str


Block = Text | Table | Figure | Facts | Code


@dataclass(frozen=True)
class Advice:
    """What to do next, why, and the setting to change."""

    action: str
    why: str = ""
    setting: str = ""


@dataclass
class Page:
    """What a page shows, from the top; ``missing`` says what could not be shown, with the reason."""

    title: str
    facts: Sequence[tuple[str, str]]
    summary: Sequence[str]
    curve: Sequence[Figure] = ()
    advice: Advice | None = None
    sections: dict[str, Sequence[Block]] = field(default_factory=dict)
    """By title."""
    missing: dict[str, str] = field(default_factory=dict)

    def figure(self, what: str, chart: Chart | str, caption: str, about: str = "", whole: bool = False) -> list[Figure]:
        """Return a figure, or nothing where ``chart`` is the reason why ``what`` is missing."""
        if isinstance(chart, Chart):
            return [Figure(chart, caption, about, whole)]
        self.missing[what] = chart
        return []

    def charts(self) -> Iterator[Chart]:
        blocks = itertools.chain(self.curve, *self.sections.values())
        return (block.chart for block in blocks if isinstance(block, Figure))

    def html(self) -> str:
        """Return the page. Raises ``ConfigError`` without jinja2."""
        script = (files("next_core.report") / "templates" / "page.js").read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        about = {"version": version("next-core"), "script": script, "digest": digest, "css": _css()}
        text = make_environment().get_template("page.html").render(page=self, **about).strip() + "\n"
        return UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def make_environment() -> Any:
    """Return the templates. Raises ``ConfigError`` without jinja2."""
    jinja2 = import_optional("jinja2", "report")
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = jinja2.Environment(loader=jinja2.PackageLoader("next_core.report"), **options)
    made.globals["kind"] = lambda block: type(block).__name__.lower()
    return made


def _css() -> str:
    """Return the colours, and the rules by which an unticked key hides its series, also without scripts."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in each.items()) for each in (LIGHT, DARK))
    swatches = "".join(f".k-{name}{{background:var(--{name})}}" for name in (*COLOURS, "walk", "soft", "ink"))
    hidden = ",".join(f"figure:has(input[value=s{n}]:not(:checked)) svg .s{n}" for n in range(MOST_SERIES))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{swatches}{hidden}{{display:none}}"
