"""Resume, rollback and accidents: nothing that a later resume needs is lost, and nothing is counted twice."""

from pathlib import Path
from typing import Any

import pytest
import torch

from next_backends.trl import PredictExtendCallback, TrlBackend
from next_core import History, open_checkpoints
from next_core.errors import NextCoreError
from next_core.storage.manifest import check_manifest
from tests.backends.trl.conftest import FACTORS, MERGED, SAVING, Watch, adapted, jumping
from tests.errors import raises_kind

pytestmark = pytest.mark.trl


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("predictor", [FACTORS, MERGED], ids=["factors", "merged"])
def test_a_run_killed_while_recovering_judges_the_jump_later(make_trainer: Any, trained: Any, predictor: Any) -> None:
    # Saved at 8, in the window of the jump at 6 that is judged at 9, and rolled back there.
    def go(**fields: Any) -> tuple[Any, PredictExtendCallback]:
        readings = iter(fields.pop("readings"))
        made = jumping(predictor, guards={"recovery": 3}, evaluate=lambda model: next(readings), settle=3)
        return make_trainer([made], steps=12, **SAVING), made

    whole, first = go(readings=[0.5, 0.5, 0.1])
    whole.train()
    assert [jump["accepted"] for jump in first.journal.jumps()] == [False]
    folder = Path(whole.args.output_dir)
    assert (folder / "next-core" / "jumps" / "0001" / "undone.json").exists()

    resumed, again = go(readings=[0.1])
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert [jump["accepted"] for jump in again.journal.jumps()] == [False]
    mine = trained(resumed.model)
    assert all(torch.equal(value, mine[name]) for name, value in trained(whole.model).items())


def test_after_a_late_rollback_the_history_starts_anew_and_the_start_is_kept(make_trainer: Any, tmp_path: Path) -> None:
    readings = iter([0.5, 0.5, 0.1] + [0.5] * 20)
    made = jumping(
        {"name": "rl-extra"}, guards={"recovery": 3}, evaluate=lambda m: next(readings), jump_every=3, settle=3
    )
    make_trainer([made], steps=15, lora=False, learning_rate=1e-4).train()
    first, *later = made.journal.jumps()
    assert not first["accepted"]
    assert any(jump["accepted"] for jump in later)  # the full-parameter run still has its backbone: step 0
    assert open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints").steps[0] == 9


@pytest.mark.parametrize(("predictor", "reason"), [(FACTORS, "another run"), (MERGED, "jump-1")])
def test_a_resume_from_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
    make_trainer: Any, tmp_path: Path, predictor: dict[str, Any], reason: str
) -> None:
    def trainer() -> Any:
        return make_trainer([jumping(predictor | {"window": 2}, every=2, horizon=2)], steps=9, **SAVING)

    make_trainer([], steps=8, out="other", learning_rate=5e-3, **SAVING).train()
    trainer().train()
    folder = tmp_path / "trainer" / "next-core"
    before = names(folder / "checkpoints"), names(folder / "jumps"), (folder / "journal.jsonl").read_text()
    with raises_kind("checkpoint-other-model", "step 8", reason):
        trainer().train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-8"))
    assert (names(folder / "checkpoints"), names(folder / "jumps"), (folder / "journal.jsonl").read_text()) == before


def test_a_run_that_was_not_watched_cannot_be_resumed_with_jumps(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer([], steps=8, **SAVING).train()
    with raises_kind("checkpoint-no-history", tmp_path / "trainer" / "next-core"):
        make_trainer([jumping()], steps=12).train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-8"))


def test_half_removed_folders_of_a_killed_process_do_no_harm(make_trainer: Any, tmp_path: Path, dead: int) -> None:
    make_trainer([jumping()], steps=12, **SAVING).train()
    folder = tmp_path / "trainer" / "next-core"
    (folder / "checkpoints" / "step-000012" / "adapter_config.json").unlink()
    (folder / "checkpoints" / f".step-000009.tmp-{dead}").mkdir()
    resumed = make_trainer([jumping()], steps=12, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-8"))
    assert names(folder / "checkpoints") == [f"step-{n:06d}" for n in (0, 3, 6, 9, 12)]


def test_another_run_is_overwritten_when_asked_only_and_other_files_never(make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(NextCoreError, match="DoRA"):  # a setting that is refused leaves no run behind
        make_trainer([jumping(folder=tmp_path)], steps=8, lora={"use_dora": True}).train()
    make_trainer([jumping(folder=tmp_path)], steps=8).train()
    with raises_kind("config-other-run", tmp_path, "predictor", "overwrite=True"):
        make_trainer([jumping("stay", folder=tmp_path)], steps=8).train()
    (tmp_path / "notes.txt").write_text("keep me")
    (tmp_path / "checkpoints" / "mine").mkdir()
    make_trainer([jumping(folder=tmp_path, overwrite=True)], steps=8).train()
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "checkpoints" / "mine").exists()


def test_all_is_on_disk_after_training(make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer([jumping(folder=tmp_path / "w")], steps=9).train()
    assert open_checkpoints(tmp_path / "w" / "checkpoints").steps == (3, 6, 9)

    import next_backends.trl.tensors as tensors

    real = tensors.save_file

    def full(values: Any, path: Path, **fields: Any) -> None:
        if "step-000009" in str(path):
            raise OSError(28, "No space left on device")
        real(values, path, **fields)

    monkeypatch.setattr(tensors, "save_file", full)
    with raises_kind("storage-full", "step-000009"):
        make_trainer([jumping(folder=tmp_path / "v")], steps=9).train()


def test_no_jump_on_a_full_disk(
    make_trainer: Any, logits: Any, plain_logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import next_backends.history_folder as history_folder

    def full(*args: Any, **fields: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history_folder, "save_file", full)
    for predictor in (FACTORS, MERGED):
        made = jumping(predictor, overwrite=True)
        trainer = make_trainer([made], steps=8)
        trainer.train()
        assert "the disk is full" in made.journal.jumps()[0]["reason"]
        assert torch.equal(logits(trainer.model), plain_logits(8, True))


def test_an_adapter_that_was_trained_before_counts_from_where_rl_began(make_trainer: Any, tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    make_trainer([jumping("stay")], steps=9, lora=False, model=model).train()
    source = open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints")
    for parameter in source.parameters:
        start = source.delta(parameter.name, 9, since=0)
        whole, absolute = source.delta(parameter.name, 9), source.position(parameter.name, 9)
        torch.testing.assert_close(whole.dense(), start.dense())
        assert absolute.dense().norm() > 3 * whole.dense().norm()


def test_metrics_belong_to_the_steps_they_were_logged_for_live_and_offline(make_trainer: Any, tmp_path: Path) -> None:
    live: list[Any] = []

    def rewards() -> list[float | None]:
        return History(open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints")).metrics("reward")

    watch = Watch(lambda step, model: live.extend(rewards()) if step == 9 else None)
    make_trainer([jumping("stay"), watch], steps=12, logging_steps=3).train()
    offline = rewards()
    assert None not in offline
    assert live[:2] == offline[:2]
    assert live[2:] in ([], [None])  # of step 9 nothing is logged yet when it ends


def test_a_half_that_safetensors_left_is_not_sealed_into_the_checkpoint_written_again(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"moments")
    (tmp_path / ".tmpArIA8G").write_bytes(b"half")
    backend = TrlBackend()
    backend.saved(tmp_path)
    backend.flush()
    assert names(tmp_path) == ["manifest.json", "optimizer.pt"]
    check_manifest(tmp_path, contents=True)
