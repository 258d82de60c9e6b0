"""What bf16 leaves of a small motion, compared with the motion itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.sources.full_model import FullModelSource
from next_core.sources.precision import _blocks, _largest, rounding_report, rounding_warnings, ulp
from tests.conftest import LoraRun, noise
from tests.errors import raises_kind
from tests.sources.models import MODULE, adapter, adapter_tensors

STD = 0.02


def save(root: Path, steps: dict[int, dict[str, Tensor]]) -> FullModelSource:
    for step, tensors in steps.items():
        (root / f"checkpoint-{step}").mkdir(parents=True)
        save_file(tensors, root / f"checkpoint-{step}" / "model.safetensors")
    return open_checkpoints(root)


def moved(shape: tuple[int, int], sigma: float, bulk: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight matrix, its motion (rank one of size ``sigma``, and independent noise), and that one's direction."""
    W = STD * noise(f"W{seed}", *shape).double()
    u, v = (noise(f"{side}{seed}", size).double() for side, size in zip("uv", shape, strict=True))
    u, v = u / u.norm(), v / v.norm()
    return W, sigma * torch.outer(u, v) + bulk * noise(f"N{seed}", *shape).double(), u


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_spacing_is_that_to_the_next_number(dtype: torch.dtype) -> None:
    values = torch.tensor([1e-9, 0.011, 0.02, 0.25, 0.3, 1.0, 1.5, 200.0]).to(dtype)
    for value, spacing in zip(values.double(), ulp(values, dtype), strict=True):
        above = (value + spacing).to(dtype).double()
        between = (value + spacing * 0.25).to(dtype).double()
        assert above == value + spacing
        assert between == value


@pytest.mark.parametrize("shape", [(400, 400), (600, 200)])
@pytest.mark.parametrize("bulk", [0.0, 1e-6, 1e-5])
def test_a_direction_is_called_drowned_when_bf16_hides_it(tmp_path: Path, shape: tuple[int, int], bulk: float) -> None:
    cosines: dict[bool, list[float]] = {True: [], False: []}
    for seed, sigma in enumerate((3e-5, 1e-4, 2e-4, 4e-4, 2e-3, 4e-3, 1e-2, 3e-2)):
        W, D, u = moved(shape, sigma, bulk, seed)
        source = save(tmp_path / str(seed), {10: {"w": W.bfloat16()}, 20: {"w": (W + D).bfloat16()}})
        U, S, _ = torch.linalg.svd(torch.as_tensor(source.delta("w", 20, 10)).double())
        report = rounding_report(source, "w", 20, 10, sigma=float(S[0]))
        assert rounding_report(source, "w", 20, 10).drowned == report.drowned
        cosines[report.drowned].append(abs(float(U[:, 0] @ u)))
    # A hidden direction is never called visible, and a drowned one is well hidden.
    assert len(cosines[True]) >= 3
    assert len(cosines[False]) >= 4
    assert min(cosines[False]) > 0.9
    assert max(cosines[True]) < 0.9


@pytest.mark.parametrize(("sigma", "bulk"), [(0.02, 1e-4), (1e-3, 1e-6)])
def test_the_figures_are_those_of_the_matrices(tmp_path: Path, sigma: float, bulk: float) -> None:
    W, D, _ = moved((40, 30), sigma, bulk, 0)
    first, then = W.bfloat16(), (W + D).bfloat16()
    source = save(tmp_path, {10: {"w": first}, 20: {"w": then}})
    report = rounding_report(source, "w", 20, 10)
    delta = then.double() - first.double()
    spacing = torch.stack([ulp(first, torch.bfloat16), ulp(then, torch.bfloat16)])
    assert report.delta_rms == pytest.approx(float(delta.square().mean().sqrt()))
    assert report.noise_rms == pytest.approx(float((spacing.square().sum(0) / 12).mean().sqrt()))
    assert report.delta_to_ulp == pytest.approx(report.delta_rms / float(spacing.square().mean().sqrt()))
    assert report.sigma == pytest.approx(float(torch.linalg.matrix_norm(delta, 2)), rel=1e-4)
    noise_of, seen = spacing.square().sum(0) / 12, delta.square()
    rows, columns = (torch.minimum(noise_of.sum(side), seen.sum(side)).max().sqrt() for side in (1, 0))
    assert report.noise_sigma == pytest.approx(float(rows + columns))
    assert report.floor == pytest.approx(float(min(noise_of.mean(), seen.mean()).sqrt()) * 1200**0.25)
    assert (report.name, report.step, report.since) == ("w", 20, 10)
    assert report.drowned == (report.sigma <= report.noise_sigma)


def test_blocks_of_rows_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    W, D, _ = moved((50, 30), 0.01, 1e-5, 0)
    source = save(tmp_path, {10: {"w": W.bfloat16()}, 20: {"w": (W + D).bfloat16()}})
    whole = rounding_report(source, "w", 20, 10)
    monkeypatch.setattr("next_core.sources.precision.BLOCK", 100)
    parts = rounding_report(source, "w", 20, 10)
    for figure in ("delta_rms", "noise_rms", "delta_to_ulp", "sigma", "noise_sigma", "floor"):
        assert getattr(parts, figure) == pytest.approx(getattr(whole, figure)), figure


def test_in_full_precision_nothing_is_drowned(tmp_path: Path) -> None:
    W, D, _ = moved((40, 30), 1e-6, 0.0, 0)
    source = save(tmp_path, {10: {"w": W.float()}, 20: {"w": (W + D).float()}})
    report = rounding_report(source, "w", 20, 10)
    assert (report.noise_rms, report.noise_sigma, report.delta_to_ulp, report.drowned) == (0, 0, float("inf"), False)
    assert rounding_warnings(source) == []


def test_a_backbone_in_bf16_counts_for_one_end(tmp_path: Path) -> None:
    W, D, _ = moved((200, 200), 0.0, 1e-6, 0)
    source = save(tmp_path, {0: {"w": W.bfloat16()}, 10: {"w": (W + D).float()}})
    report = rounding_report(source, "w", 10)
    assert report.noise_rms == pytest.approx(float((ulp(W.bfloat16(), torch.bfloat16).square().mean() / 12).sqrt()))
    assert report.drowned


def test_warnings_say_how_many_matrices_were_examined(tmp_path: Path) -> None:
    names = [f"layers.{i}.w" for i in range(30)]
    pairs = {name: moved((60, 60), 0.0 if i < 29 else 0.1, 1e-6, i) for i, name in enumerate(names)}
    source = save(
        tmp_path,
        {
            10: {name: W.bfloat16() for name, (W, _, _) in pairs.items()} | {"full": torch.zeros(2, 2)},
            20: {name: (W + D).bfloat16() for name, (W, D, _) in pairs.items()} | {"full": torch.ones(2, 2)},
        },
    )
    first, second = rounding_warnings(source, sample=5)
    assert first.startswith("30 of 31 matrices are stored in bfloat16; between steps 10 and 20 they moved by 0.0")
    assert "median of 5" in first
    assert second.startswith("4 of these 5 are drowned in rounding, such as 'layers.0.w'")


def test_a_precision_is_that_of_the_newest_checkpoint(tmp_path: Path, lora_run: LoraRun) -> None:
    source = save(tmp_path / "full", {10: {"w": torch.ones(2, 2)}, 20: {"w": torch.ones(2, 2).half()}})
    assert source.precision("w") == torch.float16
    with raises_kind("checkpoint-not-found", "'x'"):
        source.precision("x")
    assert open_checkpoints(lora_run.path).precision("model.layers.0.self_attn.q_proj.weight") == torch.float32
    tensors = adapter_tensors(10)
    key = next(key for key in tensors if "lora_B" in key)
    weights = adapter(tmp_path / "lora" / "checkpoint-10", 10) / "adapter_model.safetensors"
    save_file(tensors | {key: tensors[key].bfloat16()}, weights)
    assert open_checkpoints(tmp_path / "lora").precision(f"{MODULE}.weight") == torch.bfloat16


def test_a_report_needs_full_weights_and_a_known_parameter(tmp_path: Path, lora_run: LoraRun) -> None:
    lora = open_checkpoints(lora_run.path)
    with raises_kind("checkpoint-no-full-weights", "peft-adapter"):
        rounding_report(lora, lora.parameters[0].name, 20, 10)
    assert rounding_warnings(lora) == []
    source = save(tmp_path, {10: {"w": torch.ones(2, 2)}})
    assert rounding_warnings(source) == []
    with raises_kind("checkpoint-not-found", "'x'"):
        rounding_report(source, "x", 10)


def test_a_bounded_number_of_rows_of_a_matrix_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def seen(matrix: torch.Tensor) -> float:
        held.append(tuple(matrix.shape))
        return _largest(matrix)

    monkeypatch.setattr("next_core.sources.precision._largest", seen)
    W, D, _ = moved((9000, 8), 0.0, 1e-6, 0)
    source = save(tmp_path, {10: {"w": W.bfloat16()}, 20: {"w": (W + D).bfloat16()}})
    warnings = rounding_warnings(source)
    assert held == [(4096, 8)]
    assert "drowned in rounding, such as 'w'" in warnings[1]
    whole, part = rounding_report(source, "w", 20, 10), rounding_report(source, "w", 20, 10, most_rows=4096)
    assert part.delta_to_ulp == pytest.approx(whole.delta_to_ulp, rel=0.2)


@pytest.mark.parametrize("most", [1, 3, 256, 1000, 4096])
def test_sampled_rows_are_spread_over_the_matrix_without_duplicates(most: int) -> None:
    rows = [row for block in _blocks((5000, 3), most) for row in range(block.start, block.stop)]
    assert len(rows) == len(set(rows)) <= most
    assert len(rows) >= most * 0.7
    assert max(rows) < 5000
    assert len(rows) <= 256 or (min(rows), max(rows)) == (0, 4999)


def test_embeddings_and_heads_are_examined_only_if_there_is_nothing_else(tmp_path: Path) -> None:
    W, D, _ = moved((60, 60), 0.0, 1e-6, 0)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    still = {10: dict.fromkeys(names, W.bfloat16()), 20: {name: (W + D).bfloat16() for name in names}}
    still = {step: {name: value.clone() for name, value in tensors.items()} for step, tensors in still.items()}
    alone = rounding_warnings(save(tmp_path / "alone", still))
    assert "median of 2" in alone[0]
    inner = {10: {"model.layers.0.w": W.bfloat16()}, 20: {"model.layers.0.w": (W + 1).bfloat16()}}
    both = rounding_warnings(save(tmp_path / "both", {step: still[step] | inner[step] for step in (10, 20)}))
    assert both[0].startswith("3 of 3 matrices")
    assert "median of 1" in both[0]
    assert len(both) == 1
