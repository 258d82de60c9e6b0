"""The comparisons that are ready to run: each loads, and says at its top how many RL steps it takes."""

import re
import sys
from pathlib import Path

import pytest

from next_core.comparison import load_comparison
from next_core.comparison.races import make_plan

FOLDER = Path(__file__).parents[2] / "benchmarks" / "compare"
ROLES = ["plain", "plain", "control", "control"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_comparison_can_be_run_and_says_what_it_takes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # rewards of the examples lie beside them
    config, arms = load_comparison(file)
    plan = make_plan(config, arms)
    roles = [arm.role for arm in arms if arm.name != "tuned"]
    assert roles == ROLES + ["arm"] * len(config.arms), "both plain runs and both controls are there"
    assert plan.shared > 0
    top = re.sub(r"\n# ", " ", file.read_text().partition("\nbase:")[0])
    assert "?" in top
    assert f"Takes {plan.steps:,} RL steps, {len(plan.races)} races of {len(config.seeds)} seeds." in top


def test_the_comparisons_of_all_methods_differ_only_in_their_task() -> None:
    texts = [(FOLDER / f"{name}.yaml").read_text().partition("\nbase:") for name in ("methods", "sorting", "editing")]
    assert len({after.partition("\n")[2] for _, _, after in texts}) == 1, "a row of the table is the same arm of each"
