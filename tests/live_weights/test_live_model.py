"""What a live model keeps in files: restored as it was, and refused where it is of other processes."""

from pathlib import Path

import torch
from torch import nn

from next_core.live_weights.live_model import LiveModel
from tests.errors import raises_kind


def test_the_files_of_kept_weights_bring_them_back_where_the_shapes_are_the_same(tmp_path: Path) -> None:
    model, part = nn.Linear(5, 6), nn.Linear(5, 1)
    live, before = LiveModel(model), model.weight.detach().clone()
    live.save_kept(live.keep(), tmp_path)
    with torch.no_grad():
        model.weight += 1
    live.restore_saved(tmp_path)
    assert torch.equal(model.weight, before)
    other = LiveModel(part)
    other.save_kept(other.keep(), tmp_path)  # as each of six processes holds it: copying would repeat its row
    with raises_kind("checkpoint-no-history", "(1, 5)", "(6, 5)"):
        live.restore_saved(tmp_path)
    assert torch.equal(model.weight, before)
