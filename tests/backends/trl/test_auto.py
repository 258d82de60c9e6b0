"""``auto`` in a real trainer: it jumps without a setting, and a resumed run takes its multiple up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from next_backends.trl import PredictExtendCallback

pytestmark = pytest.mark.trl


def multiples(callback: PredictExtendCallback) -> dict[int, float]:
    return {jump["step"]: jump["diagnostics"]["multiple"] for jump in callback.journal.jumps()}


def test_it_needs_no_setting_and_survives_a_resume(make_trainer: Any, trained: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 26}
    first = PredictExtendCallback("auto", settle=2)
    whole = make_trainer([first], steps=34, **saving)
    whole.train()
    found = multiples(first)
    assert sorted(found) == list(range(20, 34, 2))
    assert found[20] > 1.02  # the first steps of this base go straight on
    assert found[22] == found[28] == found[20]  # measured every 10 steps
    assert any(jump["accepted"] for jump in first.journal.jumps())

    again = PredictExtendCallback("auto", settle=2)
    resumed = make_trainer([again], steps=34, **saving)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-26"))
    assert multiples(again) == found
    mine = trained(resumed.model)
    assert all(torch.equal(value, mine[name]) for name, value in trained(whole.model).items())
