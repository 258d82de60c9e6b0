"""Every block of code on a page is run, or says why it is not."""

import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_core.comparison import load_comparison
from next_core.config import make_config
from next_core.run_config import RunConfig
from next_core.storage.yaml_files import parse_yaml
from tests.conftest import Cli
from tests.docs.blocks import ALL, LANGUAGES, PAGES, ROOT, Block, blocks, of

TRAIN = ("run", "compare")  # Commands that take long: the page's own line is checked whole by their dry run


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(b.language == language and b.is_run for b in blocks(page))]


def test_every_block_says_what_it_is_and_output_where_it_is_from() -> None:
    assert len(ALL) > 30
    for block in ALL:
        assert block.language in LANGUAGES, f"{block}: {block.language or 'no language'}"
        if block.language == "text":
            assert block.mark is not None, f"{block} shows output; name the command that it is the output of"
            assert block.mark[0] == "output of", block
        elif block.mark is not None:
            assert block.mark[0] == "not run", block


def test_what_is_not_run_is_little_and_has_a_reason() -> None:
    skipped = [block for block in ALL if block.mark is not None and block.mark[0] == "not run"]
    assert len(skipped) <= len([block for block in ALL if block.is_run]) / 3
    for block in skipped:
        assert len(block.mark[1].split()) >= 2, block


class Trainer:
    """Stands for the trainer a reader has: it is made with the callback, and trains nothing."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        assert options["callbacks"]


@pytest.mark.trl
@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_its_first_line_to_its_last(page: Path, reader: Path) -> None:
    from transformers import AutoModelForCausalLM

    taken: dict[str, Any] = {"GRPOTrainer": Trainer, "__name__": "page"}
    taken["model"] = AutoModelForCausalLM.from_pretrained(reader / "models" / "base")
    for block in blocks(page):
        if block.language == "python" and block.is_run:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), taken)


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_a_config_a_comparison_or_a_part_of_one(block: Block, reader: Path) -> None:
    raw = parse_yaml(block.code, str(block))
    if "arms" in raw:
        (reader / "comparison.yaml").write_text(block.code)
        load_comparison(reader / "comparison.yaml")
    elif raw.keys() <= RunConfig.model_fields.keys():
        make_config(whole(raw), where=str(block), base=reader)
    else:
        OpenRlhfConfig.model_validate({"python": "python", **raw})


def whole(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a config, with what every config needs put beside it."""
    task = "examples/arithmetic"
    data = {split: f"{task}/{split}.jsonl" for split in ("train", "validation", "test")}
    training = {"model": f"{task}/base", "data": data} | raw.get("training", {})
    return {"steps": 400} | dict(raw) | {"training": training}


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_toml_is_toml(block: Block) -> None:
    assert tomllib.loads(block.code)


@pytest.fixture(scope="module")
def checked() -> set[str]:
    """Commands that stood on a page before."""
    return set()


@pytest.mark.trl
@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_they_say(page: Path, reader: Path, cli: Cli, checked: set[str]) -> None:
    for block in blocks(page):
        if block.language == "bash" and block.is_run:
            for command in (command for command in block.commands if command not in checked):
                check(command, str(block), cli)
                checked.add(command)


def check(command: str, where: str, cli: Cli) -> None:
    """Run a line, or what of it can be told without installing or training."""
    program, *arguments = shlex.split(command)
    if program == "next-core":
        if arguments[0] in TRAIN:  # into a folder of its own: those of the page hold what it shows reports of
            arguments += ["--dry-run", "--out", "planned"]
        outcome = cli(*arguments)
        assert outcome.code == 0, f"{where}: {command}\n{outcome.err}"
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), f"{where}: {command}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"next-core\[([^\]]+)\]", command):
            assert set(named.split(",")) <= set(extras), f"{where}: {command}"
    elif program in ("python", ".venv/bin/python"):
        files = [argument for argument in arguments if argument.endswith(".py")]
        assert all((ROOT / file).exists() for file in files), f"{where}: {command}"
    else:
        pytest.fail(f"{where}: no test knows how to check '{command}'; mark the block, or teach this one")
