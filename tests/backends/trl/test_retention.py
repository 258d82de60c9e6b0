"""``keep: needed`` under a real trainer: the same jumps and weights, and no file that nothing reads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from next_backends.trl import PredictExtendCallback
from next_core import History, make_predictor, open_checkpoints
from next_core.cycle.journal import read_journal
from next_core.diagnostics import with_origin
from tests.backends.trl.conftest import FACTORS, of_each_kind
from tests.errors import raises_kind

pytestmark = pytest.mark.trl

SCHEDULE = {"observe": 4, "every": 2, "horizon": 2, "jump_every": 2, "settle": 2, "alpha": 2.0}
SAVING = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 2}


def trained(make_trainer: Any, keep: str, predictor: Any, resume: Any = None, **fields: Any) -> Any:
    callback = PredictExtendCallback(predictor, **SCHEDULE, keep=keep)
    trainer = make_trainer([callback], steps=14, out=keep, **SAVING, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def jumps(folder: Path) -> list[dict[str, Any]]:
    records = [record for record in read_journal(folder / "journal.jsonl") if record["event"] == "jump"]
    assert sum(record["accepted"] for record in records) >= 5
    return records


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


@of_each_kind
def test_retention_moves_no_weight(predictor: Any, lora: bool, make_trainer: Any, logits: Any, tmp_path: Path) -> None:
    predictor = predictor | {"window": 2}
    every, some = (trained(make_trainer, keep, predictor, lora=lora) for keep in ("all", "needed"))
    folders = tmp_path / "all" / "next-core", tmp_path / "needed" / "next-core"
    assert jumps(folders[0]) == jumps(folders[1])
    assert torch.equal(logits(some.model), logits(every.model))
    # The trainer keeps its checkpoints of steps 10 and 14.
    assert set(steps(folders[1])) - {"step-000000"} == {"step-000010", "step-000014"}
    assert len(steps(folders[0])) == 8
    assert (len(list((folders[1] / "jumps").iterdir())) < 5) == (predictor["space"] == "factors" or not lora)
    # From the older of them, the resumed run makes the same jumps again.
    again = trained(make_trainer, "needed", predictor, str(tmp_path / "needed" / "checkpoint-10"), lora=lora)
    assert torch.equal(logits(again.model), logits(every.model))


def test_a_run_that_would_need_what_was_deleted_does_not_resume(make_trainer: Any, tmp_path: Path) -> None:
    trained(make_trainer, "needed", FACTORS | {"window": 2})
    checkpoint = str(tmp_path / "needed" / "checkpoint-10")
    with raises_kind("checkpoint-no-history", "step 6", "keep: needed"):
        trained(make_trainer, "needed", FACTORS | {"window": 6}, checkpoint)


def test_who_reads_the_folder_later_is_told_what_is_missing(make_trainer: Any, tmp_path: Path) -> None:
    callback = PredictExtendCallback(FACTORS | {"window": 2}, **SCHEDULE, keep="needed", average=6)
    make_trainer([callback], steps=13).train()
    source = open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints")
    assert source.begins == source.steps[0] == 13
    assert any("before step 13" in note for note in source.notes)
    with raises_kind("checkpoint-no-history", "step 13", "keep: all"):
        with_origin(source)
    with raises_kind("checkpoint-no-history", "step 13"):
        make_predictor("rl-extra").fit(History(source)).predict(4)


def test_a_history_that_was_deleted_counts_from_its_first_checkpoint(make_trainer: Any, tmp_path: Path) -> None:
    trained(make_trainer, "needed", {"name": "secant", "window": 4})
    folder = tmp_path / "needed" / "next-core" / "checkpoints"
    (folder / "deleted.json").write_text('{"step": 10, "start": false}')
    source = with_origin(open_checkpoints(folder))
    assert (source.origin, source.steps) == (10, (14,))
    assert any("step 10" in note for note in source.notes)
    name = source.parameters[0].name
    assert History(source).grams()[name].shape == (1, 1)
