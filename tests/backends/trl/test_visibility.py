"""What a user of the callback sees: decisions among the trainer's metrics, warnings, and the summary at the end."""

import logging
from typing import Any

import pytest
from transformers import TrainerCallback

from next_backends.trl import PredictExtendCallback
from tests.backends.trl.conftest import FACTORS, SMALL, jumping

pytestmark = pytest.mark.trl


class Tracker(TrainerCallback):
    """Records what it is given to log, as a tracker of ``report_to`` does, which precedes a user's callbacks."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append({"step": state.global_step, **logs})


def test_decisions_are_logged_at_their_steps_for_trackers_and_history(make_trainer: Any, tmp_path: Any) -> None:
    def train(name: str, first: Tracker, last: Tracker) -> Any:
        measured = iter([0.4, 0.5, 0.5, 0.1])
        callback = PredictExtendCallback(
            FACTORS, evaluate=lambda model: next(measured), **SMALL | {"jump_every": 3, "settle": 3}
        )
        trainer = make_trainer([first, callback, last], out=name, steps=12, logging_steps=3)
        trainer.train()
        return trainer

    first, last = Tracker(), Tracker()
    trainer = train("a", first, last)
    assert first.logged == last.logged == [{**row} for row in trainer.state.log_history]
    made, refused = ({k: v for k, v in row.items() if "/" in k} for row in first.logged if "next_core/accepted" in row)
    assert made.pop("next_core/seconds") > 0
    assert made.pop("next_core/norm_ratio") == pytest.approx(1, abs=0.5)
    assert made == {"next_core/accepted": 1, "next_core/accuracy_before": 0.4, "next_core/accuracy_after": 0.5}
    assert (refused["next_core/accepted"], refused["next_core/accuracy_after"]) == (0, 0.1)
    assert [row["step"] for row in first.logged if "next_core/accepted" in row] == [6, 9]
    # The trainer's own records are those of a run without ours: of the same steps, with the same reward.
    own = [row["step"] for row in first.logged if "reward" in row and "loss" in row]
    assert own == [3, 6, 9, 12]
    metrics = (tmp_path / "a" / "next-core" / "metrics.jsonl").read_text()
    assert metrics.count("\n") == len(own) + 1  # and the trainer's totals
    assert "next_core/" not in metrics


def test_step_scaling_is_logged_with_its_multiple_and_agreement(make_trainer: Any) -> None:
    tracker = Tracker()
    make_trainer([tracker, PredictExtendCallback({"name": "step-scale", "block": 2})], steps=8).train()
    rows = [row for row in tracker.logged if "next_core/multiple" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(row["next_core/accepted"] == 1 for row in rows)
    assert -1 <= rows[-1]["next_core/agreement"] <= 1


def test_the_first_refusal_of_each_kind_is_a_warning(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "next_core")
    callback = jumping(FACTORS, guards={"max_norm_ratio": 1e-3}, jump_every=3, settle=0)
    make_trainer([callback], steps=12).train()
    assert len(callback.journal.jumps()) == 3
    (warning,) = (record.getMessage() for record in caplog.records if "max_norm_ratio" in record.getMessage())
    assert "step 6" in warning


def test_a_summary_is_printed_at_the_end(make_trainer: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measured = iter([0.4, 0.5, 0.45, 0.55])
    callback = jumping(FACTORS, evaluate=lambda model: next(measured), average=6)
    make_trainer([callback], steps=12, logging_steps=3).train()
    printed = capsys.readouterr().out
    folder = tmp_path / "trainer" / "next-core"
    for words in ("12 steps", "1 jump", "the last 6 steps", "0.400 after step 6, 0.550 after step 12", "Reward: "):
        assert words in printed
    assert printed.endswith(f"Folder: {folder}\nReport: next-core report {folder}\n")
