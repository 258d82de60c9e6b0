"""What is written loads in plain PEFT and says exactly what base weights plus the explicit delta say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core import make_applier, make_predictor, open_checkpoints
from next_core.errors import ConfigError, GuardError, PluginError
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from tests.conftest import LoraRun, noise

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "mixed ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 32, "up_proj": 4}},
    "mixed ranks and rslora": {
        "rank_pattern": {"layers.1.*proj": 2},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def runs(make_lora_run: Callable[..., LoraRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoraRun]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_lora_run(folder / name.replace(" ", "-"), (0, 10, 20), **lora) for name, lora in RUNS.items()}


def opened(run: LoraRun) -> PeftAdapterSource:
    source = open_checkpoints(run.path, backbone=run.base)
    assert isinstance(source, PeftAdapterSource)
    return source


def low_rank(name: str, shape: tuple[int, int], k: int = 2) -> LowRank:
    return LowRank(0.3 * noise(name + "left", shape[0], k).double(), 0.3 * noise(name + "right", k, shape[1]).double())


def predict(source: PeftAdapterSource, what: str) -> tuple[Prediction, dict[str, Tensor]]:
    """A prediction, and the W_hat - W_T at alpha 1.5 that it stands for, computed from the files by hand."""
    updates: dict[str, Update] = {}
    explicit: dict[str, Tensor] = {}
    confidence = {source.parameters[0].name: 0.5}
    for parameter in source.parameters[:-1]:  # the last one has no update, and stays
        name, shape = parameter.name, parameter.shape
        scale = 1.5 * confidence.get(name, 1.0)
        at: dict[int, LoraFactors] = {step: source.factors(name, step) for step in (0, 10, 20)}
        s = at[20].scaling
        W = {step: s * at[step].B.double() @ at[step].A.double() for step in at}
        if what == "factors":
            updates[name] = CoefficientUpdate({20: 1.0, 10: -1.0}, "factors")
            A = at[20].A.double() + scale * (at[20].A.double() - at[10].A.double())
            B = at[20].B.double() + scale * (at[20].B.double() - at[10].B.double())
            explicit[name] = s * B @ A - W[20]
        elif what == "merged":
            updates[name] = CoefficientUpdate({20: 1.0, 10: -1.0}, "merged")
            explicit[name] = scale * (W[20] - W[10])
        elif what == "cumulative":
            updates[name] = CoefficientUpdate({20: 1.5}, "merged")
            explicit[name] = scale * 0.5 * W[20]
        else:
            updates[name] = LowRankUpdate(low_rank(name, shape))
            explicit[name] = scale * low_rank(name, shape).dense()
    anchor: Any = "backbone" if what == "cumulative" else "newest"
    return Prediction(source, 20, 10, anchor, updates, confidence), explicit


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


@pytest.mark.parametrize("what", ["factors", "merged", "cumulative", "low rank"])
@pytest.mark.parametrize("kind", RUNS)
def test_the_adapter_loads_in_plain_peft_with_the_logits_of_the_explicit_weights(
    runs: dict[str, LoraRun], kind: str, what: str, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    run = runs[kind]
    prediction, explicit = predict(opened(run), what)
    make_applier("peft-adapter").apply(prediction, alpha=1.5, out=tmp_path / "out")
    expected = expected_logits(run, explicit, logits)
    assert (expected - expected_logits(run, {}, logits)).abs().max() > 1e-3
    torch.testing.assert_close(adapter_logits(run, tmp_path / "out", logits), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", RUNS)
def test_in_factor_space_the_adapter_keeps_its_ranks_and_its_config(
    runs: dict[str, LoraRun], kind: str, tmp_path: Path
) -> None:
    run = runs[kind]
    prediction, _ = predict(opened(run), "factors")
    make_applier("peft-adapter").apply(prediction, alpha=1.5, out=tmp_path / "out")
    stored = run.folder(20)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == json.loads(
        (stored / "adapter_config.json").read_text()
    )
    before = load_file(stored / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    still = [key for key in before if key.startswith("base_model.model.model.layers.1.self_attn.v_proj")]
    assert all(torch.equal(before[key], after[key]) for key in still)
    moved = [key for key in before if key not in still]
    assert not any(torch.equal(before[key], after[key]) for key in moved)


@pytest.mark.parametrize("what", ["factors", "low rank"])
@pytest.mark.parametrize(("kind", "rank"), [("plain", 3), ("mixed ranks and rslora", 2), ("plain", 50)])
def test_a_truncated_adapter_is_the_best_of_its_rank(
    runs: dict[str, LoraRun], kind: str, rank: int, what: str, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    run = runs[kind]
    source = opened(run)
    prediction, explicit = predict(source, what)
    make_applier("peft-adapter", rank=rank).apply(prediction, alpha=1.5, out=tmp_path / "out")
    best = {}
    for parameter in source.parameters:
        name = parameter.name
        whole = run.deltas[20][name] + explicit.get(name, 0.0)
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        best[name] = U[:, :rank] * S[:rank] @ Vh[:rank] - run.deltas[20][name]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max(min(tensor.shape) for tensor in tensors.values()) <= max(rank, 8)
    found = adapter_logits(run, tmp_path / "out", logits)
    torch.testing.assert_close(found, expected_logits(run, best, logits), atol=1e-5, rtol=1e-5)


def test_what_an_adapter_holds_besides_lora_factors_is_carried_along(
    make_lora_run: Callable[..., LoraRun], tmp_path: Path
) -> None:
    run = make_lora_run(tmp_path / "run", (10, 20), target_modules=["q_proj"], modules_to_save=["lm_head"])
    prediction = make_predictor("secant").fit(History(opened(run))).predict(10)
    make_applier("peft-adapter").apply(prediction, out=tmp_path / "out")
    stored = load_file(run.folder(20) / "adapter_model.safetensors")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.lm_head.weight"
    assert torch.equal(written[key], stored[key])
    assert set(written) == set(stored)


def test_rolling_back_removes_the_folder(runs: dict[str, LoraRun], tmp_path: Path) -> None:
    prediction, _ = predict(opened(runs["plain"]), "factors")
    applied = make_applier("peft-adapter").apply(prediction, out=tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").exists()
    applied.rollback()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("applier", ["peft-adapter", "merged-model"])
@pytest.mark.parametrize(
    ("update", "alpha"),
    [
        (LowRankUpdate(LowRank(torch.full((16, 1), math.nan), torch.ones(1, 16))), 1.0),
        (LowRankUpdate(LowRank(torch.full((16, 1), 1e30).double(), torch.ones(1, 16).double())), 1e30),
        (CoefficientUpdate({20: math.inf, 10: -1.0}, "factors"), 1.0),
        (CoefficientUpdate({20: 1e200, 10: -1.0}, "factors"), 1.0),
    ],
    ids=["nan", "beyond fp32", "infinite", "factors beyond fp32"],
)
def test_a_prediction_that_is_not_finite_is_refused_and_leaves_nothing(
    runs: dict[str, LoraRun], tmp_path: Path, applier: str, update: Update, alpha: float
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    prediction = Prediction(opened(runs["plain"]), 20, 10, updates={name: update})
    with pytest.raises(GuardError, match=f"'{name}'.* nothing was"):
        make_applier(applier).apply(prediction, alpha=alpha, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("applier", ["peft-adapter", "merged-model"])
def test_nothing_is_written_onto_what_exists_or_into_what_is_read(
    runs: dict[str, LoraRun], tmp_path: Path, applier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["plain"]
    prediction, _ = predict(opened(run), "factors")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there exists already; choose another folder or remove it"):
        make_applier(applier).apply(prediction, out=tmp_path / "there")
    (tmp_path / "link").symlink_to(run.base)
    monkeypatch.chdir(run.path)
    for target in (run.path, run.folder(20), run.path / "new", Path("new"), run.base, run.base / "new"):
        with pytest.raises(ConfigError, match="which is being read; choose a folder outside it"):
            make_applier(applier).apply(prediction, out=target)
    with pytest.raises(ConfigError, match="which is being read"):
        make_applier(applier).apply(prediction, out=tmp_path / "link" / "new")
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint-0", "checkpoint-10", "checkpoint-20"]


@pytest.mark.parametrize("applier", ["peft-adapter", "merged-model"])
def test_an_update_of_a_parameter_that_the_run_does_not_have_is_refused(
    runs: dict[str, LoraRun], tmp_path: Path, applier: str
) -> None:
    prediction = Prediction(opened(runs["plain"]), 20, 10, updates={"other": CoefficientUpdate({20: 1.0})})
    with pytest.raises(PluginError, match="the prediction names 'other', which the run does not have"):
        make_applier(applier).apply(prediction, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_lora_is_told_which_applier_to_use(tmp_path: Path) -> None:
    source = MemorySource({10: {"a": torch.ones(3, 3)}}, {"a": torch.zeros(3, 3)})
    with pytest.raises(ConfigError, match="needs a run of LoRA adapters; use 'merged-model'"):
        make_applier("peft-adapter").apply(Prediction(source, 10, 10), out=tmp_path / "out")


def test_a_prediction_that_moves_nothing_writes_the_trained_adapter(
    runs: dict[str, LoraRun], tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    run = runs["mixed ranks"]
    prediction = Prediction(
        opened(run), 20, 10, "backbone", {run_name: CoefficientUpdate({20: 1.0}) for run_name in run.deltas[20]}
    )
    make_applier("peft-adapter").apply(prediction, out=tmp_path / "out")
    stored = load_file(run.folder(20) / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, stored[key])


def test_a_jump_of_the_run_is_in_the_adapter_that_is_written(
    make_lora_run: Callable[..., LoraRun], tmp_path: Path
) -> None:
    """The jump after the newest checkpoint was made once that was stored: it is part of W_T."""
    from safetensors.torch import save_file

    run = make_lora_run(tmp_path / "run" / "checkpoints", (0, 10, 20))
    folder = tmp_path / "run" / "jumps" / "0001"
    folder.mkdir(parents=True)
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.weight.lora_B": noise("jump", 16, 4)}, folder / "shift.safetensors")
    (folder / "jump.json").write_text(json.dumps({"step": 20, "alpha": 1.0, "adapter": None}))
    prediction = Prediction(opened(run), 20, 10)
    make_applier("peft-adapter").apply(prediction, out=tmp_path / "out")
    key = f"base_model.model.{name}.lora_B.weight"
    stored = load_file(run.folder(20) / "adapter_model.safetensors")[key]
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "adapter_model.safetensors")[key], stored + noise("jump", 16, 4)
    )


def test_a_secant_in_merged_space_does_not_store_the_newest_a_twice(runs: dict[str, LoraRun], tmp_path: Path) -> None:
    prediction, _ = predict(opened(runs["rslora"]), "merged")
    make_applier("peft-adapter").apply(prediction, out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (6, 16)  # of rank 3
