"""fp32 masters from DeepSpeed's optimizer states: found, asked of DeepSpeed by its public function, and compared.

DeepSpeed itself is not here: a function of the same signature stands for its reader.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.errors import CheckpointError, ConfigError
from next_core.sources.deepspeed import READER, zero_folder
from next_core.sources.full_model import FullModelSource
from tests.sources.models import MODULE, adapter, adapter_tensors

MASTERS = {
    step: torch.full((3, 2), 1 + step / 10_000) for step in (10, 20, 30)
}  # nothing of the motion is left in bf16

NEARLY_ONE = 1 + 1.2e-7


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints that DeepSpeed was asked for."""
    module: Any = ModuleType(READER)
    calls = []

    def read(root: str, tag: str, exclude_frozen_parameters: bool) -> dict[str, Tensor]:
        print("Processing zero checkpoint")
        assert exclude_frozen_parameters
        calls.append(f"{Path(root).name}/{tag}")
        file = next((Path(root) / tag).glob("*_optim_states.pt"))
        found: dict[str, Tensor] = torch.load(file, weights_only=True)
        return found

    module.get_fp32_state_dict_from_zero_checkpoint = read
    monkeypatch.setitem(sys.modules, READER, module)
    return calls


def run(root: Path, place: str) -> Path:
    for step, master in MASTERS.items():
        folder = root / f"global_step{step}_hf"
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        save_file({"w": master.bfloat16(), "frozen": torch.ones(2, 2).bfloat16()}, folder / "model.safetensors")
        zero = root / place.format(step)
        zero.mkdir(parents=True)
        torch.save({"w": master}, zero / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return root


@pytest.mark.parametrize("place", ["_actor/global_step{}", "global_step{0}_hf/global_step{0}"])
def test_masters_show_the_motion_that_bf16_hides(
    tmp_path: Path, asked: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, place)
    stored, source = open_checkpoints(tmp_path), open_checkpoints(tmp_path, masters=True, allow_pickle=True)
    assert isinstance(source, FullModelSource)
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
    assert capsys.readouterr().out == ""  # what DeepSpeed prints is no output of ours


def test_masters_of_an_adapter_have_the_names_of_the_live_model(tmp_path: Path, asked: list[str]) -> None:
    for step in (10, 20):
        (adapter(tmp_path / f"global_step{step}_hf", step) / "tokenizer_config.json").write_text("{}")
        zero = tmp_path / "_actor" / f"global_step{step}"
        zero.mkdir(parents=True)
        live = {
            key.replace(".weight", ".default.weight"): value * NEARLY_ONE
            for key, value in adapter_tensors(step).items()
        }
        torch.save(live, zero / "x_optim_states.pt")
    source = open_checkpoints(tmp_path, masters=True, allow_pickle=True)
    found = source.factors(f"{MODULE}.weight", 20)
    assert found is not None
    assert torch.equal(found.B, torch.full((3, 2), 20 * NEARLY_ONE))
    assert not torch.equal(found.B, torch.full((3, 2), 20.0))
    assert asked == ["_actor/global_step20"]


def test_masters_of_another_step_are_refused(tmp_path: Path, asked: list[str]) -> None:
    run(tmp_path, "_actor/global_step{}")
    file = next((tmp_path / "_actor" / "global_step20").iterdir())
    source = open_checkpoints(tmp_path, masters=True, allow_pickle=True)
    torch.save({"w": MASTERS[20] * 1.1}, file)
    with pytest.raises(CheckpointError, match=r"_actor/global_step20: 'w' is not what .*global_step20_hf/model"):
        source.delta("w", 20, 10)
    torch.save({"w": torch.ones(2, 3)}, file)
    with pytest.raises(CheckpointError, match=r"'w' is \(2, 3\) but \(3, 2\) in "):
        open_checkpoints(tmp_path, masters=True, allow_pickle=True).delta("w", 20, 10)
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"_actor/global_step20: DeepSpeed cannot read it"):
        open_checkpoints(tmp_path, masters=True, allow_pickle=True).delta("w", 20, 10)


def test_a_checkpoint_without_masters_is_named_with_the_places(tmp_path: Path, asked: list[str]) -> None:
    run(tmp_path, "_actor/global_step{}")
    file = next((tmp_path / "_actor" / "global_step20").iterdir())
    assert zero_folder(tmp_path / "global_step20_hf", 20) == file.parent
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"global_step20_hf has no fp32 masters: no .* in .*_actor/global_step20 or"
    ):
        open_checkpoints(tmp_path, masters=True, allow_pickle=True)


def test_masters_need_trust_and_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "_actor/global_step{}")
    with pytest.raises(ConfigError, match=r"pickles that can run code; trust them with allow_pickle=True as well"):
        open_checkpoints(tmp_path, masters=True)
    monkeypatch.setitem(sys.modules, READER, None)
    with pytest.raises(ConfigError, match=r"masters=True needs DeepSpeed .*: pip install deepspeed"):
        open_checkpoints(tmp_path, masters=True, allow_pickle=True)
