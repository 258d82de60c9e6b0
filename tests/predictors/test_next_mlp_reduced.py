"""next-mlp-reduced: few coordinates are enough, mean the same in every matrix, and map back to the weights."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core.history.history import History
from next_core.interfaces import CheckpointSource, Prediction
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from next_predictors.next_mlp_reduced import Basis, NextMLPReduced
from tests.predictors.trajectories import curve, dense_run, drift, history, moved, noise, resolve_dense

OBSERVED = tuple(range(10, 160, 10))
HORIZON = 50
SIZES = {"a": (7, 5), "b": (9, 5), "c": (7, 8), "d": (12, 10)}
QUICK: dict[str, Any] = {"epochs": 20, "hidden": 8}  # for what does not depend on a good fit


def run(path: Any, steps: tuple[int, ...] = OBSERVED, names: str = "abcd") -> MemorySource:
    return dense_run({name: path(100 * ord(name), *SIZES[name]) for name in names}, steps)


def lora_run(steps: tuple[int, ...] = OBSERVED) -> MemorySource:
    """B grows, slows down and turns, A drifts, each checkpoint has some noise: rank 4, several singular values."""

    def at(seed: int, m: int, n: int, t: int) -> LoraFactors:
        x = t / 100
        A = noise(seed, 4, n) + 0.3 * (1 - math.exp(-x)) * noise(seed + 1, 4, n)
        main = torch.outer(noise(seed + 2, m), noise(seed + 3, 4))
        B = (1 - math.exp(-x)) * (main + 0.1 * noise(seed + 4, m, 4)) + 0.05 * x**1.5 * noise(seed + 5, m, 4)
        return LoraFactors(A, B + (t > 0) * 0.002 * noise(seed + 10 + t, m, 4), 2.0)

    sizes = [(48, 32), (32, 48), (32, 32), (48, 32)]
    return MemorySource({t: {str(i): at(1000 * i, m, n, t) for i, (m, n) in enumerate(sizes)} for t in (0, *steps)})


def predict(past: History, horizon: int = HORIZON, **fields: Any) -> Prediction:
    return NextMLPReduced(**fields).fit(past).predict(horizon)


def error(prediction: Prediction, truth: CheckpointSource) -> float:
    """|predicted - true| / |true| over all matrices; without a jump it is 1."""
    missed, size = 0.0, 0.0
    for parameter in truth.parameters:
        true = truth.delta(parameter.name, prediction.step + HORIZON, prediction.step)
        whole = true if isinstance(true, Tensor) else true.dense()
        missed += float((resolve_dense(prediction, parameter.name) - whole).square().sum())
        size += float(whole.square().sum())
    return math.sqrt(missed / size)


@pytest.fixture(scope="module")
def past() -> History:
    return history(run(curve))


def test_it_predicts_a_curved_trajectory_far_better_than_staying(past: History) -> None:
    assert error(predict(past), run(curve, (*OBSERVED, 200))) < 0.3


def test_twelve_coordinates_keep_nearly_all_of_a_lora_run() -> None:
    figures = predict(history(lora_run()), **QUICK).diagnostics
    assert min(figures["kept/u"], figures["kept/v"]) >= 0.9999
    few = predict(history(lora_run()), q=1, **QUICK).diagnostics
    assert max(few["kept/u"], few["kept/v"]) < 0.9999
    assert min(few["kept/u"], few["kept/v"]) > 0.5


def test_the_prediction_lies_in_what_the_history_spans() -> None:
    """Motion in one direction of 48 cannot be predicted out of it, whatever the networks say."""
    past = history(run(drift))
    for name, found in moved(predict(past, q=3, **QUICK)).items():
        u, v = past.components("global")[name].U[-1], past.components("global")[name].V[-1]
        torch.testing.assert_close(u @ (u.mT @ found @ v) @ v.mT, found, rtol=0, atol=1e-9 * float(found.norm()))


def test_a_basis_is_orthonormal_and_the_newest_position_is_positive_in_it(past: History) -> None:
    kinds = {"global": None, "local": None, "target": HORIZON}
    components = {kind: past.components(kind, horizon)["d"] for kind, horizon in kinds.items()}
    for q, spanned in ((4, 4), (12, 10)):
        basis = Basis.of(components, q)
        gram = basis.right.mT @ basis.right
        torch.testing.assert_close(gram, torch.diag((torch.arange(q) < spanned).double()), rtol=0, atol=1e-9)
        encoded = basis.encode(components["global"])
        assert bool((encoded.U[-1] >= 0).all() and (encoded.V[-1] >= 0).all())
        assert float(encoded.S[-1]) == pytest.approx(1)
        assert encoded.V.shape == (15, q, 1)


def test_all_matrices_share_one_network_for_each_component(past: History) -> None:
    figures = predict(past, **QUICK).diagnostics
    assert {name for name in figures if name.startswith("loss/")} == {"loss/u/12", "loss/sigma/1", "loss/v/12"}


def test_turning_and_scaling_a_matrix_turns_and_scales_its_jump() -> None:
    """Coordinates know neither the directions nor the size of a matrix's motion."""
    turn = torch.linalg.qr(noise(1, 7, 7)).Q
    sources = [
        MemorySource({t: {"w": factor @ curve(3)(t)} for t in OBSERVED}, {"w": torch.zeros(7, 5).double()})
        for factor in (torch.eye(7).double(), 100 * turn)
    ]
    as_is, turned = (moved(predict(history(source), **QUICK))["w"] for source in sources)
    torch.testing.assert_close(100 * turn @ as_is, turned, rtol=1e-3, atol=1e-3 * float(turned.norm()))


def test_the_estimated_cost_hardly_depends_on_the_size_of_matrices() -> None:
    small = NextMLPReduced().work(SIZES, OBSERVED, HORIZON, 1)
    with_a_large_one = NextMLPReduced().work({**SIZES, "e": (4096, 4096)}, OBSERVED, HORIZON, 1)
    assert with_a_large_one.single_flops < 2 * small.single_flops
    assert NextMLPReduced().work(SIZES, OBSERVED[:5], HORIZON, 1).single_flops == 0
