"""The same script, started again: afresh, from its checkpoint, or beside a run that finished."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from next_backends.trl import PredictExtendCallback
from next_core.cycle.journal import read_journal
from next_core.live_weights.frozen_adapters import jump_adapters
from tests.backends.trl.conftest import FACTORS, MERGED, SAVING, SMALL, jumping
from tests.errors import raises_kind

pytestmark = pytest.mark.trl


class Killed(Exception):  # noqa: N818
    """Stands in for the end of the process."""


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def killed(make_trainer: Any, step: int, **fields: Any) -> None:
    with pytest.raises(Killed):
        make_trainer([jumping(), Kill(step)], **fields).train()


def test_a_run_without_a_checkpoint_starts_afresh_and_a_finished_one_is_kept(
    make_trainer: Any, logits: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(make_trainer, 7)
    folder = tmp_path / "trainer" / "next-core"
    first = make_trainer([jumping()])
    first.train()
    assert "step 6" in caplog.text
    journal = (folder / "journal.jsonl").read_bytes()
    again = make_trainer([jumping()])
    again.train()
    assert (folder / "earlier-1" / "journal.jsonl").read_bytes() == journal
    assert (folder / "earlier-1" / "checkpoints" / "step-000006").is_dir()
    for trainer in (first, again):
        assert torch.equal(logits(trainer.model), logits(first.model))
    events = [record["event"] for record in read_journal(folder / "journal.jsonl")]
    assert (events[0], events.count("jump"), events[-1]) == ("start", 1, "end")


def test_a_run_that_can_be_resumed_is_not_started_anew_by_mistake(make_trainer: Any, tmp_path: Path) -> None:
    killed(make_trainer, 7, **SAVING)
    with raises_kind("config-other-run", "step 6", "resume_from_checkpoint"):
        make_trainer([jumping()], **SAVING).train()
    make_trainer([jumping()], **SAVING).train(resume_from_checkpoint=True)


def test_a_resume_with_another_predictor_is_noted(
    make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "next_core")
    killed(make_trainer, 7, **SAVING)
    for predictor in ("stay", "stay", FACTORS):
        killed_at = tmp_path / "trainer" / "checkpoint-4"
        made = jumping(predictor)
        make_trainer([made], **SAVING).train(resume_from_checkpoint=str(killed_at))
    resumes = [record for record in made.journal.records if record["event"] == "resume"]
    assert [record.get("predictor", {}).get("name") for record in resumes] == ["stay", None, "secant"]
    said = [record.getMessage() for record in caplog.records if "step 4" in record.getMessage()]
    assert len(said) == 2
    assert "stay" in said[0]


def test_a_run_shorter_than_its_schedule_is_a_plain_run_with_a_warning(
    make_trainer: Any, logits: Any, plain_logits: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = jumping(observe=9)
    trainer = make_trainer([made], steps=8)
    trainer.train()
    assert torch.equal(logits(trainer.model), plain_logits(8, True))
    assert not (tmp_path / "trainer" / "next-core").exists()
    assert caplog.text.count("observe 9") == 1


def test_a_training_that_is_interrupted_and_resumed_in_one_process_ends_as_the_whole_one(
    make_trainer: Any, logits: Any
) -> None:
    ends = []
    for interrupted in (False, True):
        made = jumping(MERGED, jump_every=3, settle=0)
        trainer = make_trainer([made], steps=11, out=f"{interrupted}", **SAVING)
        if interrupted:
            trainer.add_callback(kill := Kill(10))
            with pytest.raises(Killed):
                trainer.train()
            kill.step = 0
        trainer.train(resume_from_checkpoint=interrupted)
        assert jump_adapters(trainer.model) == ["jump-1", "jump-2"]
        ends.append(logits(trainer.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("predictor", [MERGED, "auto"])
def test_a_finished_run_that_is_resumed_ends_at_once_in_the_same_weights(
    make_trainer: Any, logits: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, predictor: Any
) -> None:
    found = []
    for resume in (None, True):
        made = PredictExtendCallback(predictor, **({} if predictor == "auto" else SMALL))
        trainer = make_trainer([made], **SAVING)
        trainer.train(resume_from_checkpoint=resume)
        journal = (tmp_path / "trainer" / "next-core" / "journal.jsonl").read_bytes()
        found.append((trainer.state.global_step, journal, logits(trainer.model)))
    assert "step 12" in caplog.text
    (_, journal, first), (step, again, second) = found
    assert (step, again) == (12, journal)
    assert torch.equal(first, second)
    assert not (tmp_path / "trainer" / "checkpoint-13").exists()
    trainer.args.max_steps = 13  # the next training is a plain one
    trainer.remove_callback(made)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 13


@pytest.mark.parametrize("name", ["snoo", "ema-pull"])
def test_methods_with_a_state_take_it_up_again_from_the_checkpoints(make_trainer: Any, trained: Any, name: str) -> None:
    schedule = {"observe": 2, "every": 2, "horizon": 2, "jump_every": 2, "average": None}
    first = PredictExtendCallback(name, **schedule)
    whole = make_trainer([first], steps=10, save_strategy="steps", save_steps=6)
    whole.train()
    assert [jump["accepted"] for jump in first.journal.jumps()] == [True] * 5
    resumed = make_trainer([PredictExtendCallback(name, **schedule)], steps=10, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-6"))
    mine = trained(resumed.model)
    assert all(torch.equal(value, mine[name]) for name, value in trained(whole.model).items())
