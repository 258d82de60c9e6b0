"""Checkpoints of torch.distributed.checkpoint, saved by torch and accelerate in two processes, are read exactly."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from next_core import open_checkpoints
from next_core.sources.distributed_files import METADATA, DistributedFile, _MetadataUnpickler
from tests.backends.trl.launch import Launch
from tests.errors import raises_kind
from tests.sources.models import Hostile, adapter, model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
WHOLE = {"rows": torch.arange(15.0).view(5, 3), "stack": torch.randn(2, 3, 4).bfloat16(), "scalar": torch.tensor(2.0)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dcp")
    run = Launch(out, "save", Path(__file__).with_name("dcp_saver.py"), [str(out)], torchrun=True)
    assert run.codes == [0], run.log
    return out


@pytest.mark.parametrize(
    ("trainer", "naming"),
    [
        ("accelerate", "checkpoint-N"),
        ("nemo", "step_N/policy/weights"),
        ("prime", "step_N/trainer"),
        ("plain", "step-N"),
    ],
)
def test_what_the_trainers_save_is_read(saved: Path, trainer: str, naming: str) -> None:
    with raises_kind("checkpoint-pickle", METADATA, "--allow-pickle"):
        open_checkpoints(saved / trainer)
    source = open_checkpoints(saved / trainer, allow_pickle=True)
    assert (source.name, source.naming, source.steps) == ("full-model", naming, (10, 20))
    assert [p.name for p in source.parameters] == ["0.weight", "1.weight", "2.weight"]
    for step in (10, 20):
        for name, value in load_file(saved / f"truth-{step}.safetensors").items():
            assert source.model(step).dtype(name) == value.dtype
            assert torch.equal(source.model(step).raw(name), value)
            for begin in range(len(value)):
                rows = slice(begin, begin + 2)
                assert torch.equal(source.model(step).raw(name, rows), value[rows])
    assert source.fingerprint(20) != source.fingerprint(10)


def saved_alone(folder: Path) -> Path:
    dcp.save({"model": dict(WHOLE)}, checkpoint_id=folder, no_dist=True)
    return folder / METADATA


def test_stacks_and_scalars_are_read(tmp_path: Path) -> None:
    file = DistributedFile(saved_alone(tmp_path))
    assert file.shapes == {name: tuple(value.shape) for name, value in WHOLE.items()}
    assert all(torch.equal(file.raw(name), value) for name, value in WHOLE.items())
    assert torch.equal(file.raw("stack", (1, slice(1, 3))), WHOLE["stack"][1, 1:3])
    assert file.unchanged()
    (data,) = tmp_path.glob("*.distcp")
    os.utime(data, ns=(1, 1))
    assert not file.unchanged()


def edited(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change the metadata that torch wrote."""

    def edit(path: Path) -> None:
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return edit


def shift(metadata: Any) -> None:
    chunk = metadata.state_dict_metadata["model.rows"].chunks[0]
    metadata.state_dict_metadata["model.rows"].size = torch.Size((6, 3))
    assert chunk.sizes == torch.Size((5, 3))


def enlarge(metadata: Any) -> None:
    stored = metadata.state_dict_metadata["model.rows"]
    stored.size = stored.chunks[0].sizes  # what follows changes both
    object.__setattr__(stored.chunks[0], "sizes", torch.Size((10**7, 10**7)))
    stored.size = torch.Size((10**7, 10**7))


def escape(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (lambda path: next(path.parent.glob("*.distcp")).unlink(), "checkpoint-incomplete"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "checkpoint-damaged"),
        (lambda path: path.write_bytes(pickle.dumps(Hostile(path.parent / "ran"))), "checkpoint-damaged"),
        (edited(shift), "checkpoint-damaged"),
        (edited(enlarge), "checkpoint-damaged"),
        (edited(escape), "checkpoint-unsafe-path"),
    ],
)
def test_damaged_and_hostile_metadata_are_refused(tmp_path: Path, break_it: Callable[[Path], None], kind: str) -> None:
    path = saved_alone(tmp_path)
    break_it(path)
    with raises_kind(kind, tmp_path):
        DistributedFile(path)
    assert not (tmp_path / "ran").exists()


class Attribute:
    """Pickled as an attribute of something, as Python before 3.11.4 pickles the members of enumerations."""

    def __init__(self, of: Any, name: str) -> None:
        self.parts = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.parts


def test_attributes_in_metadata_are_members_of_enumerations_only() -> None:
    def load(of: Any, name: str) -> Any:
        return _MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(of, name)))).load()

    format_ = next(iter(_MEM_FORMAT_ENCODING))
    assert load(_MEM_FORMAT_ENCODING, format_.name) is format_
    for of, name in ((_MEM_FORMAT_ENCODING, "__init__"), (Metadata, "__init__")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            load(of, name)


def test_damaged_data_are_refused(tmp_path: Path) -> None:
    path = saved_alone(tmp_path)
    (data,) = tmp_path.glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    with raises_kind("checkpoint-damaged", data, "'rows'"):
        DistributedFile(path).raw("rows")


def test_an_adapter_or_a_whole_model_in_the_same_folder_comes_first(tmp_path: Path) -> None:
    for step in (10, 20):
        saved_alone(adapter(tmp_path / "a" / f"checkpoint-{step}", step) / "pytorch_model_fsdp_0")
        saved_alone(model(tmp_path / "m" / f"checkpoint-{step}", step) / "pytorch_model_fsdp_0")
    assert open_checkpoints(tmp_path / "a").name == "peft-adapter"
    source = open_checkpoints(tmp_path / "m")
    assert [p.name for p in source.parameters] == ["w.weight"]
