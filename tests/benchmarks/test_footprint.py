"""The benchmark of bytes, memory and seconds runs on tiny shapes, and counts what it says."""

from pathlib import Path

import pytest

from benchmarks.footprint import measure
from benchmarks.speed.synthetic import TOY

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("lora", [True, False])
def test_a_history_is_counted_in_trained_weights(lora: bool, tmp_path: Path) -> None:
    rows = measure(TOY, lora, tmp_path, fresh=False)
    trained, own = rows["plain"]["trained"], rows["plain"]["a_save"]
    assert own == pytest.approx(3 * trained, rel=0.3)
    assert rows["plain"]["history"] == rows["auto"]["history"] == 0
    everything, needed = rows["secant, keep all"], rows["secant, keep needed"]
    # 9 checkpoints and 3 jumps, with the headers of small tensors.
    assert 12 * trained < everything["history"] < 16 * trained
    assert needed["history"] < 0.4 * everything["history"]
    assert needed["a_save"] == everything["a_save"] == pytest.approx(own, rel=0.2)
    assert list(tmp_path.iterdir()) == []
