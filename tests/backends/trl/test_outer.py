"""Methods with a state of their own, in a real trainer: a resumed run takes it up again from the checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from next_backends.trl import PredictExtendCallback

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("name", ["snoo", "ema-pull"])
def test_a_resumed_run_ends_as_the_whole_one(make_trainer: Any, trained: Any, name: str) -> None:
    schedule = {"observe": 2, "every": 2, "horizon": 2, "jump_every": 2, "average": None}
    first = PredictExtendCallback(name, **schedule)
    whole = make_trainer([first], steps=10, save_strategy="steps", save_steps=6)
    whole.train()
    assert [jump["accepted"] for jump in first.journal.jumps()] == [True] * 5
    resumed = make_trainer([PredictExtendCallback(name, **schedule)], steps=10, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-6"))
    mine = trained(resumed.model)
    assert all(torch.equal(value, mine[name]) for name, value in trained(whole.model).items())
