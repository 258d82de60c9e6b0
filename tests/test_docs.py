"""What the pages show is what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from next_backends.openrlhf.config import OpenRlhfConfig
from next_core import History, make_predictor, registry
from tests.predictors import trajectories

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_predictor_of_ten_lines_works_as_shown() -> None:
    (code, *_) = BLOCK.findall((ROOT / "docs" / "predictors.md").read_text())
    exec(compile(code, "docs/predictors.md", "exec"), {})
    source = trajectories.linear_lora_run()
    prediction = make_predictor("last-step").fit(History(source)).predict(10)
    assert prediction.updates
    assert "last-step" in registry().names("predictor")


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_table_of_predictors_names_every_first_party_one() -> None:
    page = (ROOT / "docs" / "predictors.md").read_text()
    ours = [e.name for e in registry().entries() if e.kind == "predictor" and e.distribution == "next-core"]
    assert ours
    for name in ours:
        assert f"| `{name}` |" in page


OPENRLHF = (ROOT / "docs" / "openrlhf.md").read_text()


def fields(model: type[BaseModel], parents: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field by its dotted name, those of blocks included."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{parents}{name}.")
        else:
            yield parents + name, field


def section(title: str) -> str:
    return OPENRLHF.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def shown(field: FieldInfo) -> str:
    """A default as the table writes it: as YAML does."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def test_the_table_of_openrlhfs_block_has_every_field_with_its_default_and_no_other() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+ \|$", section("The block"), re.MULTILINE)
    assert rows == [(name, shown(field)) for name, field in fields(OpenRlhfConfig)]


def test_every_option_of_openrlhf_that_is_named_exists() -> None:
    folder = ROOT / "backends" / "next_backends" / "openrlhf"
    named = set(re.findall(r"--(?:\w+\.)+\w+", OPENRLHF))
    assert named
    assert named <= set(json.loads((folder / "options.json").read_text())["options"])


def test_the_errors_that_are_explained_are_those_of_the_code() -> None:
    folder = ROOT / "backends" / "next_backends" / "openrlhf"
    code = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    messages = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.+?) \| ", section("Errors"), re.MULTILINE)))
    assert messages
    for message in messages:
        assert message in code
