"""RELEX from the Gram matrix equals RELEX from the stacked, flattened deltas."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import LowRank
from tests.predictors.trajectories import (
    EVERY_TEN,
    curve,
    curved_lora_run,
    dense_run,
    drift,
    predicted_by,
    relative_error,
    resolve_dense,
)

predict = functools.partial(predicted_by, "relex")


def by_definition(source: CheckpointSource, rank: int, target: int, pinned: bool) -> Tensor:
    """W_hat - W_T by a dense SVD of M and a least-squares line for each component."""
    deltas = [source.delta("a", step) for step in source.steps]
    dense = [delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas]
    U, s, Vh = torch.linalg.svd(torch.stack([delta.flatten() for delta in dense]), full_matrices=False)
    c = (U * s)[:, :rank].numpy()
    slope, intercept = np.polyfit(np.array(source.steps, dtype=float), c, 1)
    found: Tensor = (torch.from_numpy(slope * target + intercept) @ Vh[:rank]).reshape(dense[-1].shape)
    known: Tensor = (torch.from_numpy(c[-1]) @ Vh[:rank]).reshape(dense[-1].shape)
    return found - (known if pinned else dense[-1])


@pytest.mark.parametrize("anchor", ["backbone", "newest"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["dense", "lora"])
def test_equals_the_svd_of_the_stacked_deltas(anchor: str, rank: int, lora: bool) -> None:
    source = curved_lora_run(steps=EVERY_TEN) if lora else dense_run({"a": curve(1)})
    found = resolve_dense(predict(source, anchor=anchor, rank=rank), "a")
    torch.testing.assert_close(found, by_definition(source, rank, 130, anchor == "newest"), rtol=1e-7, atol=1e-8)


def test_the_rank_is_that_of_the_history_when_it_is_not_given() -> None:
    source = dense_run({"a": curve(1)})
    assert predict(source, view_rank=2).updates == predict(source, rank=2).updates
    assert predict(source, view_rank=2).updates != predict(source, view_rank=1).updates


def test_components_of_rounding_size_are_not_amplified() -> None:
    prediction = predict(dense_run({"a": drift(1)}), rank=9)
    assert relative_error(resolve_dense(prediction, "a"), drift(1)(30)) < 1e-5


def test_the_line_is_over_the_steps_where_checkpoints_are_not_evenly_spaced() -> None:
    source = dense_run({"a": drift(1)}, steps=[5, 10, 40, 100])
    assert relative_error(resolve_dense(predict(source), "a"), drift(1)(30)) < 1e-9
