"""What the pages show is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
