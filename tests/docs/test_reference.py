"""The generated references name everything there is: they are made of the models and the program themselves."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic import BaseModel, Field

import next_core
from docs.extensions import api_reference, cli_reference, config_reference, reference
from next_core.cli.app import app
from next_core.comparison.comparison_config import CompareConfig
from next_core.plugins import KINDS, registry
from next_core.run_config import Choice, RunConfig


class Inner(BaseModel):
    """A block."""

    ratio: float = Field(0.5, gt=0, le=1, description="A share | of *all*")


class Model(BaseModel):
    """A model of every kind of field."""

    count: int = Field(ge=1, description="How many")
    inner: Inner = Inner()
    kind: Literal["a", "b"] | None = None
    plugin: Choice = Choice(name="auto")
    files: list[Path] = []


def test_a_table_has_key_type_default_bounds_and_meaning() -> None:
    rows = config_reference.table(Model).splitlines()[2:]
    assert rows == [
        "| `count` | integer | **required** | ≥ 1 | How many |",
        "| `inner` | block | as below |  | A block. |",
        "| `kind` | `a`, `b` or `null` | `null` |  |  |",
        "| `plugin` | name or block | `auto` |  |  |",
        "| `files` | list of path | `[]` |  |  |",
    ]
    assert config_reference.table(Inner, "inner.").splitlines()[2:] == [
        r"| `inner.ratio` | number | `0.5` | > 0, ≤ 1 | A share \| of \*all\* |"
    ]


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = config_reference.block_of(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")


def test_every_key_of_a_run_and_of_a_comparison_is_there_and_has_a_meaning() -> None:
    texts = {RunConfig: config_reference.run_config(), CompareConfig: config_reference.comparison_config()}
    for model, text in texts.items():
        for key in keys(model):
            (row,) = re.findall(rf"^\| `{re.escape(key)}` \|.*$", text, re.MULTILINE)
            assert not row.endswith("|  |"), key


def test_every_plug_in_is_there_with_every_field() -> None:
    text = config_reference.plugins()
    for entry in registry().entries():
        section = text.partition(f"\n### {entry.kind}: {entry.name}")[2].partition("\n### ")[0]
        assert section, entry.name
        for key in keys(registry().get(entry.kind, entry.name).config_class):
            assert f"| `{key}` |" in section
    assert set(config_reference.HEADINGS) == set(KINDS)


def test_every_command_is_there_with_every_option_and_its_default() -> None:
    text = cli_reference.commands()
    commands: dict[str, Any] = typer.main.get_command(app).commands
    assert len(commands) > 8
    for name, command in commands.items():
        section = text.partition(f"## next-core {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts if parameter.opts[0].startswith("-") else []:
                assert f"`{option}`" in section
            assert cli_reference.escape(parameter.help) in section
    assert "| `--draws` | `INTEGER` ≥ 20 | `200` |" in text
    assert "| `--checkpoints` | `PATH` | **required** |" in text


def test_every_public_name_is_on_the_api_page() -> None:
    api_reference.SHOWN.clear()
    text = "\n".join(part() for name, part in reference.PARTS.items() if name.startswith("api-"))
    page = (Path(reference.__file__).parents[1] / "api.md").read_text()
    assert all(f"generated/{name}.md" in page for name in reference.PARTS if name.startswith("api-"))
    for name in next_core.__all__:
        assert re.search(rf":: next_core\.(\w+\.)?{name}\n", text), name
