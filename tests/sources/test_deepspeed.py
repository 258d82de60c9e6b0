"""fp32 masters from DeepSpeed's optimizer states: found, read by DeepSpeed's public function, and compared.

DeepSpeed itself is not installed here: a function of the same signature replaces its reader.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.sources.deepspeed import READER, states_folder
from next_core.sources.full_model import FullModelSource
from tests.errors import raises_kind

MASTERS = {step: torch.full((3, 2), 1 + step / 10_000) for step in (10, 20, 30)}  # all equal in bf16


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints that were read by DeepSpeed's function."""
    module: Any = ModuleType(READER)
    calls = []

    def read(root: str, tag: str, exclude_frozen_parameters: bool) -> dict[str, Tensor]:
        print("Processing zero checkpoint")
        assert exclude_frozen_parameters
        calls.append(f"{Path(root).name}/{tag}")
        file = next((Path(root) / tag).glob("*_optim_states.pt"))
        masters: dict[str, Tensor] = torch.load(file, weights_only=True)
        return masters

    module.get_fp32_state_dict_from_zero_checkpoint = read
    monkeypatch.setitem(sys.modules, READER, module)
    return calls


def run(root: Path, place: str = "_actor/global_step{}") -> Path:
    for step, master in MASTERS.items():
        folder = root / f"global_step{step}_hf"
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        save_file({"w": master.bfloat16(), "frozen": torch.ones(2, 2).bfloat16()}, folder / "model.safetensors")
        states = root / place.format(step)
        states.mkdir(parents=True)
        torch.save({"w": master}, states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return root


def opened(root: Path) -> FullModelSource:
    return open_checkpoints(root, masters=True, allow_pickle=True)


@pytest.mark.parametrize("place", ["_actor/global_step{}", "global_step{0}_hf/global_step{0}"])
def test_masters_show_motion(tmp_path: Path, asked: list[str], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, place)
    stored, source = open_checkpoints(tmp_path), opened(tmp_path)
    assert not torch.as_tensor(stored.delta("w", 20, 10)).any()
    assert torch.equal(source.delta("w", 20, 10), MASTERS[20].double() - MASTERS[10].double())
    assert torch.equal(source.delta_rows("w", slice(1, 2), 20, 10), (MASTERS[20].double() - MASTERS[10].double())[1:2])
    assert not source.delta("frozen", 20, 10).any()
    assert (stored.precision("w"), source.precision("w")) == (torch.bfloat16, torch.float32)
    assert source.fingerprint(20) != stored.fingerprint(20)
    assert len(asked) == 2  # once for each checkpoint of the delta
    source.delta("w", 30, 20)
    source.delta("w", 10, 30)
    assert len(asked) == 3
    assert capsys.readouterr().out == ""  # DeepSpeed prints, we do not


def test_masters_that_were_replaced_are_read_again(tmp_path: Path, asked: list[str]) -> None:
    source = opened(run(tmp_path))
    before, digest = torch.as_tensor(source.delta("w", 20, 10)), source.fingerprint(20)
    file = next((tmp_path / "_actor" / "global_step20").iterdir())
    file.unlink()
    torch.save({"w": MASTERS[30]}, file)  # equal in bf16, so only the masters tell the difference
    assert source.fingerprint(20) is None
    assert source.refresh() == {20}
    assert torch.equal(source.delta("w", 20, 10), MASTERS[30].double() - MASTERS[10].double())
    assert not torch.equal(source.delta("w", 20, 10), before)
    assert source.fingerprint(20) not in (None, digest)


@pytest.mark.parametrize(
    ("content", "kind", "named"),
    [
        ({"w": MASTERS[20] * 1.1}, "checkpoint-other-model", "global_step20_hf/model.safetensors"),
        ({"w": torch.ones(2, 3)}, "checkpoint-other-model", "(2, 3)"),
        (None, "checkpoint-damaged", "DeepSpeed"),
    ],
)
def test_masters_must_fit_the_weights(
    tmp_path: Path, asked: list[str], content: dict[str, Tensor] | None, kind: str, named: str
) -> None:
    run(tmp_path)
    file = next((tmp_path / "_actor" / "global_step20").iterdir())
    file.write_bytes(b"x") if content is None else torch.save(content, file)
    with raises_kind(kind, "_actor/global_step20", named):
        opened(tmp_path).delta("w", 20, 10)


def test_masters_are_read_only_if_allowed(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    file = next((tmp_path / "_actor" / "global_step20").iterdir())
    assert states_folder(tmp_path / "global_step20_hf", 20) == file.parent
    file.unlink()
    with raises_kind("checkpoint-not-found", "global_step20_hf", file.parent):
        opened(tmp_path)
    with raises_kind("config-contradiction", "allow_pickle=True"):
        open_checkpoints(tmp_path, masters=True)
    monkeypatch.setitem(sys.modules, READER, None)
    with raises_kind("config-missing-package", "pip install deepspeed"):
        opened(tmp_path)
