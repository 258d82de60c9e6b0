"""The code blocks of README.md and of the pages in docs/, each with what its page says of running it.

A comment on the line before a block marks it: ``<!-- not run: why -->``, or of a block of output
``<!-- output of: command -->``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "benchmarks").glob("*.md")])
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^\n`]*)$")
MARK = re.compile(r"^\s*<!-- (?P<what>not run|output of): (?P<why>.+) -->$")
LANGUAGES = ("python", "yaml", "bash", "toml", "text")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language, its lines, its mark."""

    page: Path
    line: int
    language: str
    code: str
    mark: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether the page does not say otherwise."""
        return self.mark is None

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, comments taken off, continued lines joined."""
        joined = self.code.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def blocks(page: Path) -> list[Block]:
    """All of a page, in order; directives of the site are none."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        opening = FENCE.match(lines[index])
        index += 1
        if opening is None:
            continue
        begin, indent = index, opening["indent"]
        while lines[index].strip() != opening["ticks"]:
            index += 1
        language = opening["language"].strip()
        if not language.startswith("{"):
            before = next((line for line in reversed(lines[: begin - 1]) if line.strip()), "")
            marked = MARK.match(before)
            code = "\n".join(line.removeprefix(indent) for line in lines[begin:index]) + "\n"
            found.append(Block(page, begin, language, code, (marked["what"], marked["why"]) if marked else None))
        index += 1
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    """The unmarked ones of a language."""
    return [block for block in ALL if block.language == language and block.is_run]
