"""The rule of ``step-scale``: when the multiple rises, falls, starts again, and what it reads from the journal."""

import math
from typing import Any

import pytest
import torch

from next_core.plugins import make_predictor, registry
from next_core.step_predictor import StepHistory, StepScale
from tests.errors import raises_kind


def products(cosine: float, blocks: int = 4) -> torch.Tensor:
    """Inner products of motions whose older and newer half have this cosine."""
    half = blocks // 2
    found = torch.full((blocks, blocks), cosine).double()
    found[:half, :half] = found[half:, half:] = 1.0
    return found


def predict(
    cosine: float, *records: dict[str, Any], step: int = 30, blocks: int = 4, multiple: float = 1.0, **fields: Any
) -> StepScale:
    predictor = registry().make("predictor", "step-scale", **fields)
    found: StepScale = predictor.predict(StepHistory(step, multiple, products(cosine, blocks), records))
    return found


def scaled(phase: int, agreement: float, settled: bool = True) -> dict[str, Any]:
    return {
        "event": "scale",
        "step": 25,
        "diagnostics": {"phase": phase, "agreement": agreement, **({"settled": 1.0} if settled else {})},
    }


COLLAPSE = {"event": "collapse", "step": 20, "multiple_before": 8.0, "back_to": 10}


@pytest.mark.parametrize(
    ("cosine", "records", "more", "multiple", "phase"),
    [
        # Agreement raises the multiple by the gain in each block, and faster where it is clear.
        (0.45, [], {}, math.exp(0.8 * 0.45), 1),
        (0.7, [scaled(1, 0.7)], {"multiple": 4.0}, 4 * math.exp(1.6 * 0.8 * 0.7), 1),
        # A falling agreement is extrapolated while the multiple rises, which need not end when it falls fast.
        (0.3, [scaled(1, 0.6)], {}, math.exp(0.8 * (0.3 - 0.3 * 0.3)), 1),
        (0.3, [scaled(1, 0.6, settled=False)], {}, math.exp(0.8 * 0.3), 1),
        (0.3, [scaled(1, 0.1)], {}, math.exp(0.8 * 0.3), 1),
        (0.1, [scaled(1, 0.6)], {}, math.exp(0.8 * (0.1 - 0.3 * 0.5)), 1),
        # Once the rate was found, agreement raises the multiple less, unless it is clear over four blocks.
        (0.25, [scaled(2, -0.2)], {}, math.exp(0.4 * 0.8 * 0.25), 2),
        (0.4, [scaled(2, -0.2)], {}, math.exp(0.8 * 0.4), 1),
        (0.4, [scaled(2, -0.2)], {"blocks": 2}, math.exp(0.4 * 0.8 * 0.4), 2),
        # A first rate at which motions hardly cancel is the one that was looked for.
        (-0.05, [scaled(0, -0.05, settled=False)], {"step": 20}, math.sqrt(15 / 20), 2),
        # After a collapse the multiple stays below half of what led to it, for some time.
        (0.7, [scaled(1, 0.7), COLLAPSE], {"step": 80, "multiple": 3.9}, 4.0, 1),
        (0.7, [scaled(1, 0.7), COLLAPSE], {"step": 85, "multiple": 3.9}, 3.9 * math.exp(1.6 * 0.8 * 0.7), 1),
        (0.7, [], {"blocks": 0, "step": 5, "multiple": 3.0}, 3.0, 0),  # too few blocks
    ],
)
def test_the_multiple_follows_the_agreement_of_motions(
    cosine: float, records: list[dict[str, Any]], more: dict[str, Any], multiple: float, phase: int
) -> None:
    found = predict(cosine, *records, **more)
    assert found.multiple == pytest.approx(multiple)
    assert found.diagnostics["phase"] == phase


def test_without_any_motion_the_multiple_stays() -> None:
    still = registry().make("predictor", "step-scale").predict(StepHistory(20, 3.0, torch.zeros(4, 4).double()))
    assert still.multiple == 3.0


def test_once_motions_cancel_the_rate_is_found_and_falls_as_one_over_the_root_of_the_step() -> None:
    found = predict(-0.2, scaled(1, 0.1), step=50)
    assert found.diagnostics["phase"] == 2
    multiple, step = found.multiple, 50
    for step in range(55, 205, 5):
        multiple = predict(-0.2, scaled(2, -0.2), step=step, multiple=multiple).multiple
    assert multiple == pytest.approx(math.sqrt(45 / 200), rel=1e-6)


def test_a_run_whose_first_blocks_cancel_starts_again_with_a_quarter() -> None:
    found = predict(-0.2, step=10, blocks=2, multiple=2.0)
    assert (found.restart, found.multiple) == (True, 0.5)
    assert not predict(-0.05, step=10, blocks=2).restart
    assert not predict(-0.2, scaled(1, 0.3), step=40, blocks=2).restart  # after a collapse, motions start anew
    back = {"event": "collapse", "step": 11, "multiple_before": 2.0, "back_to": 0}
    assert predict(-0.2, scaled(1, 0.3), back, step=20, blocks=2).restart
    assert not predict(-0.2, step=10, blocks=2, restart=False).restart


def test_a_restart_needs_the_first_weights_and_keeps_the_smallest_multiple() -> None:
    predictor = registry().make("predictor", "step-scale")
    found = predictor.predict(StepHistory(10, 2.0, products(-0.2, 2), can_restart=False))
    assert (found.restart, found.multiple) == (False, pytest.approx(2 * math.exp(-0.8 * 0.2)))
    assert predict(-0.2, step=10, blocks=2, multiple=2.0, least=1.0).multiple == 1.0
    found = predict(-0.2, step=10, blocks=2, multiple=1.0, least=1.0)
    assert (found.restart, found.multiple) == (False, 1.0)


def test_it_cannot_extrapolate_checkpoints() -> None:
    with raises_kind("predictor-needs-trainer", "step-scale"):
        make_predictor("step-scale")
