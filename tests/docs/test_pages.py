"""What the pages say is what the code does."""

import json
import re
from pathlib import Path

import pytest

from next_core import History, make_predictor, registry
from tests.docs.blocks import PAGES, ROOT, Block, of
from tests.predictors import trajectories


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


OWN = [block for block in of("python") if "@matrix_predictor(" in block.code]


@pytest.mark.parametrize("block", OWN, ids=str)
def test_the_predictor_of_ten_lines_works_as_shown(block: Block) -> None:
    exec(compile(block.code, str(block), "exec"), {"__name__": "page"})
    for name in re.findall(r'@matrix_predictor\("([^"]+)"', block.code):
        assert name in registry().names("predictor")
        assert make_predictor(name).fit(History(trajectories.linear_lora_run())).predict(10).updates


def test_the_list_of_predictors_names_every_first_party_one() -> None:
    page = (ROOT / "docs" / "predictors.md").read_text()
    ours = [e.name for e in registry().entries() if e.kind == "predictor" and e.distribution == "next-core"]
    assert ours
    for name in ours:
        assert f"\n- `{name}`: " in page


OPENRLHF = (ROOT / "docs" / "openrlhf.md").read_text()


def test_every_option_of_openrlhf_that_is_named_exists() -> None:
    recorded = ROOT / "tests" / "backends" / "openrlhf" / "cpu" / "recorded_options.json"
    named = set(re.findall(r"--(?:\w+\.)+\w+", OPENRLHF))
    assert named
    assert named <= set(json.loads(recorded.read_text()))
