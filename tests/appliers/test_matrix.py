"""The table of layouts, predictors and appliers in the documentation is true."""

from pathlib import Path

import pytest

from tests.appliers.matrix import APPLIERS, EXACT, LAYOUTS, QUICK, cells, documented, outcome_in


def test_the_table_has_all_layouts_and_each_can_be_written_or_is_refused_as_a_whole() -> None:
    table = documented()
    assert set(table) == set(LAYOUTS)
    for layout, row in table.items():
        written = any(EXACT in cell for cell in row.values())
        assert written or len(set(row.values())) == 1, layout


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_cell_is_exact_or_refused_as_the_table_says(layout: str, tmp_path: Path) -> None:
    found = cells(layout, QUICK, tmp_path)
    row = documented()[layout]
    stated = {(name, applier): outcome_in(row[applier], name) for name in QUICK for applier in APPLIERS}
    assert found == stated
