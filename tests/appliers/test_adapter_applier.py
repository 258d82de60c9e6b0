"""A written adapter loads in plain PEFT, with the logits of the base weights plus the explicit delta."""

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core import make_applier, open_checkpoints
from next_core.appliers.safetensors_writer import TensorWriter
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_source import PeftAdapterSource
from tests.appliers.conftest import BOTH, ROW, secant
from tests.conftest import LoraRun, MakeRun, noise
from tests.errors import raises_kind
from tests.sources.models import write_jump

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
WEIGHTS = "adapter_model.safetensors"
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 32, "up_proj": 4}},
    "mixed ranks and rslora": {
        "rank_pattern": {"layers.1.*proj": 2},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    },
}
KINDS = pytest.mark.parametrize("kind", RUNS)


@pytest.fixture(scope="module")
def runs(make_lora_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoraRun]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_lora_run(folder / name.replace(" ", "-"), (0, 10, 20), **lora) for name, lora in RUNS.items()}


def opened(run: LoraRun) -> PeftAdapterSource:
    return open_checkpoints(run.path, backbone=run.base)


def predict(source: PeftAdapterSource) -> tuple[Prediction, dict[str, Tensor]]:
    """A prediction with every kind of update, and its move from W_T at alpha 1.5, computed from the files by hand."""
    updates: dict[str, Update] = {}
    explicit: dict[str, Tensor] = {}
    confidence = {source.parameters[0].name: 0.5}
    for number, (name, (m, n)) in enumerate((p.name, p.shape) for p in source.parameters[:-1]):  # the last one stays
        scale = 1.5 * confidence.get(name, 1.0)
        (A, B, s), (A_10, B_10, _) = (
            (at.A, at.B, at.scaling) for at in (source.factors(name, step) for step in (20, 10))
        )
        A, B, A_10, B_10 = (x.double() for x in (A, B, A_10, B_10))
        if number % 3 == 0:
            updates[name] = CoefficientUpdate({20: 1.0, 10: -1.0}, "factors")
            explicit[name] = s * ((B + scale * (B - B_10)) @ (A + scale * (A - A_10)) - B @ A)
        elif number % 3 == 1:
            updates[name] = CoefficientUpdate({20: 1.0, 10: -1.0}, "merged")
            explicit[name] = scale * s * (B @ A - B_10 @ A_10)
        else:
            low = LowRank(0.3 * noise(name + "left", m, 2).double(), 0.3 * noise(name + "right", 2, n).double())
            updates[name], explicit[name] = LowRankUpdate(low), scale * low.dense()
    return Prediction(source, 20, 10, updates=updates, confidence=confidence), explicit


def base_model(run: LoraRun) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.base).double()


def expected_logits(run: LoraRun, moved: dict[str, Tensor], logits: Callable[[Any], Tensor]) -> Tensor:
    """Of the base model with W_T - W_0 + moved added to each weight; W_T - W_0 is PEFT's own."""
    model = base_model(run)
    with torch.no_grad():
        for name, delta in run.deltas[20].items():
            model.get_parameter(name).add_(delta + moved.get(name, 0.0))
    return logits(model)


def adapter_logits(run: LoraRun, folder: Path, logits: Callable[[Any], Tensor]) -> Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base_model(run), folder))


@pytest.mark.parametrize(("kind", "rank"), [("plain", 3), ("mixed ranks and rslora", 2), ("plain", 50)])
def test_truncation_is_optimal(
    runs: dict[str, LoraRun], kind: str, rank: int, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    run = runs[kind]
    prediction, explicit = predict(opened(run))
    make_applier("peft-adapter", rank=rank).apply(prediction, alpha=1.5, out=tmp_path / "out")
    best = {}
    for name, trained in run.deltas[20].items():
        U, S, Vh = torch.linalg.svd(trained + explicit.get(name, 0.0), full_matrices=False)
        best[name] = U[:, :rank] * S[:rank] @ Vh[:rank] - trained
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert max(min(tensor.shape) for tensor in tensors.values()) <= max(rank, 8)
    found = adapter_logits(run, tmp_path / "out", logits)
    torch.testing.assert_close(found, expected_logits(run, best, logits), atol=1e-5, rtol=1e-5)


@KINDS
def test_in_factor_space_the_adapter_keeps_its_config(runs: dict[str, LoraRun], kind: str, tmp_path: Path) -> None:
    make_applier("peft-adapter").apply(secant(runs[kind], space="factors"), alpha=1.5, out=tmp_path / "out")
    stored, out = runs[kind].folder(20), tmp_path / "out"
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (stored, out)]
    assert configs[0] == configs[1]
    before, after = load_file(stored / WEIGHTS), load_file(out / WEIGHTS)
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    assert not any(torch.equal(before[key], after[key]) for key in before)


@KINDS
def test_a_still_matrix_is_scaled_alike(
    runs: dict[str, LoraRun], kind: str, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    prediction, explicit = predict(opened(runs[kind]))
    make_applier("peft-adapter").apply(prediction, alpha=1.5, out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (config["r"], config["rank_pattern"])
    found = adapter_logits(runs[kind], tmp_path / "out", logits)
    torch.testing.assert_close(found, expected_logits(runs[kind], explicit, logits), atol=1e-5, rtol=1e-5)


def test_a_secant_in_merged_space_stores_the_newest_a_once(run: LoraRun, tmp_path: Path) -> None:
    make_applier("peft-adapter").apply(secant(run), out=tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS)[KEY.format("A")].shape == (6, 16)  # of rank 3


def test_one_modules_factors_are_in_memory_at_a_time(
    run: LoraRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[weakref.ref[Tensor]] = []
    write = TensorWriter.write

    def watched(self: TensorWriter, block: Tensor) -> None:
        assert sum(each() is not None for each in written) <= 1  # A, while B is written
        written.append(weakref.ref(block))
        write(self, block)

    monkeypatch.setattr(TensorWriter, "write", watched)
    make_applier("peft-adapter").apply(secant(run), out=tmp_path / "out")
    assert len(written) == len(load_file(tmp_path / "out" / WEIGHTS))


@BOTH
@pytest.mark.parametrize(
    ("update", "alpha", "kind"),
    [
        (LowRankUpdate(LowRank(torch.full((16, 1), math.nan), torch.ones(1, 16))), 1.0, "not-finite"),
        (CoefficientUpdate({20: math.inf, 10: -1.0}, "factors"), 1.0, "not-finite"),
        (LowRankUpdate(LowRank(torch.full((16, 1), 1e30).double(), torch.ones(1, 16).double())), 1e30, "overflow"),
        (CoefficientUpdate({20: 1e200, 10: -1.0}, "factors"), 1.0, "overflow"),
        (CoefficientUpdate({20: 1e30, 10: -1.0}, "factors"), 1.0, "overflow"),
    ],
    ids=["nan", "infinite", "beyond fp32", "factors beyond fp32", "their product beyond fp32"],
)
def test_a_jump_that_is_not_finite_in_fp32_is_refused_and_leaves_nothing(
    run: LoraRun, tmp_path: Path, applier: str, update: Update, alpha: float, kind: str
) -> None:
    prediction = Prediction(opened(run), 20, 10, updates={ROW: update})
    with raises_kind(f"numbers-{kind}", ROW):
        make_applier(applier).apply(prediction, alpha, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_no_folder_is_overwritten(run: LoraRun, tmp_path: Path, applier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with raises_kind("config-folder-not-empty", "there"):
        make_applier(applier).apply(secant(run), out=tmp_path / "there")
    (tmp_path / "file").touch()
    with raises_kind("config-folder-not-empty", "is a file"):
        make_applier(applier).apply(secant(run), out=tmp_path / "file" / "new")
    (tmp_path / "link").symlink_to(run.base)
    monkeypatch.chdir(run.path)
    targets = (
        run.path,
        run.folder(20),
        run.path / "new",
        Path("new"),
        run.base,
        run.base / "new",
        tmp_path / "link/new",
    )
    for target in targets:
        with raises_kind("config-contradiction", target, "being read"):
            make_applier(applier).apply(secant(run), out=target)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint-0", "checkpoint-10", "checkpoint-20"]


def test_a_jump_made_after_the_newest_checkpoint_is_part_of_the_adapter(make_lora_run: MakeRun, tmp_path: Path) -> None:
    run = make_lora_run(tmp_path / "run" / "checkpoints", (0, 10, 20))
    write_jump(tmp_path / "run", 20, {f"{ROW}.lora_B": noise("jump", 16, 4)})
    make_applier("peft-adapter").apply(Prediction(opened(run), 20, 10), out=tmp_path / "out")
    stored, written = load_file(run.folder(20) / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    torch.testing.assert_close(written[KEY.format("B")], stored[KEY.format("B")] + noise("jump", 16, 4))
