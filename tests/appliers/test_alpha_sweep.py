"""Several alphas of one prediction: folders that differ only in how far they jump."""

import json
import math
from pathlib import Path

import pytest
import torch

from next_core import make_applier
from next_core.appliers.folder_applier import apply_sweep
from next_core.interfaces import LowRankUpdate
from next_core.mathematics.low_rank import LowRank
from next_core.storage.manifest import check_manifest
from tests.appliers.conftest import BOTH, ROW, secant
from tests.conftest import LoraRun
from tests.errors import raises_kind

ALPHAS = [0.5, 1, 2.0]


@BOTH
def test_each_folder_is_that_of_its_alpha_alone(run: LoraRun, tmp_path: Path, applier: str) -> None:
    found = apply_sweep(make_applier(applier), secant(run), ALPHAS, tmp_path / "out")
    folders = {0.5: "alpha-0.5", 1.0: "alpha-1", 2.0: "alpha-2"}
    assert {alpha: folder.path for alpha, folder in found.items()} == {
        a: tmp_path / "out" / n for a, n in folders.items()
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*folders.values(), "manifest.json"}
    check_manifest(tmp_path / "out", contents=True)
    for alpha, folder in found.items():
        check_manifest(folder.path, contents=True)
        alone = make_applier(applier).apply(secant(run), alpha, out=tmp_path / f"{alpha}")
        [weights] = folder.path.glob("*.safetensors")
        assert weights.read_bytes() == (alone.path / weights.name).read_bytes()
        assert json.loads((folder.path / "extrapolation.json").read_text()) == alone.record
        assert folder.record["alpha"] == alpha
    found[1.0].rollback()
    assert sorted(path.name for path in (tmp_path / "out").glob("alpha*")) == ["alpha-0.5", "alpha-2"]


@pytest.mark.parametrize(
    ("alphas", "named"),
    [
        ([1, 2, 1.0], "alpha-1"),
        ([1, 1.00000001], "alpha-1"),
        ([], "one alpha"),
        ([1, 0], "got 0"),
        ([-1], "got -1"),
        ([math.inf], "got inf"),
        ([math.nan], "got nan"),
    ],
)
def test_alphas_that_make_no_folders_are_refused(run: LoraRun, tmp_path: Path, alphas: list[float], named: str) -> None:
    with raises_kind("config-invalid-value", named):
        apply_sweep(make_applier("peft-adapter"), secant(run), alphas, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_applier_that_makes_no_folder_is_refused(run: LoraRun, tmp_path: Path) -> None:
    with raises_kind("config-contradiction", "in-memory"):
        apply_sweep(make_applier("in-memory"), secant(run), ALPHAS, tmp_path / "out")


def test_one_alpha_that_overflows_leaves_none(run: LoraRun, tmp_path: Path) -> None:
    huge = LowRankUpdate(LowRank(torch.full((16, 1), 1e37), torch.ones(1, 16)))
    with raises_kind("numbers-overflow", ROW, "float32"):
        apply_sweep(make_applier("peft-adapter"), secant(run, updates={ROW: huge}), [1, 100], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
