"""Synthetic runs with known futures, and predictions resolved to dense matrices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.history.history import History
from next_core.interfaces import Prediction
from next_core.mathematics.low_rank import dense
from next_core.plugins import make_predictor
from next_core.sources.memory import MemorySource
from next_core.testing.predictor_checks import RandomSigns
from next_core.types import LoraFactors

EVERY_TEN = tuple(range(10, 110, 10))
Metrics = Mapping[int, Mapping[str, float]]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_run(
    paths: Mapping[str, Callable[[int], Tensor]], steps: Sequence[int] = EVERY_TEN, metrics: Metrics | None = None
) -> MemorySource:
    """Full-parameter checkpoints W_0 + path(t); ``paths`` are the global deltas of each matrix."""
    backbone = {name: noise(1000 + index, *path(0).shape) for index, (name, path) in enumerate(paths.items())}
    checkpoints = {t: {name: backbone[name] + path(t) for name, path in paths.items()} for t in steps}
    return MemorySource(checkpoints, backbone, metrics)


def drift(seed: int, m: int = 7, n: int = 5) -> Callable[[int], Tensor]:
    """t u v^T: exactly linear in t, and of rank 1."""
    return lambda t: t * torch.outer(noise(seed, m), noise(seed + 1, n))


def curve(seed: int, m: int = 7, n: int = 5) -> Callable[[int], Tensor]:
    """A main direction that slows down, another that bends, and noise at every checkpoint."""
    main, side = torch.outer(noise(seed, m), noise(seed + 1, n)), torch.outer(noise(seed + 2, m), noise(seed + 3, n))
    return lambda t: t**0.7 * main + 0.003 * t**1.4 * side + 0.1 * noise(seed + 10 + t, m, n)


def walk(seed: int, m: int = 7, n: int = 5) -> Callable[[int], Tensor]:
    """An isotropic random walk: each step is independent of the ones before."""
    return lambda t: noise(seed, 1000, m, n)[:t].sum(0)


def still(m: int = 7, n: int = 5) -> Callable[[int], Tensor]:
    """A frozen matrix."""
    return lambda t: torch.zeros(m, n, dtype=torch.float64)


def linear_lora(seed: int, t: int) -> LoraFactors:
    """A does not move, B = t b with b of rank 1: exactly linear in the factors, and of rank 1 as a matrix."""
    b = torch.outer(noise(seed, 7), noise(seed + 1, 2))
    return LoraFactors(A=noise(seed + 2, 2, 5), B=t * b, scaling=2.0)


def linear_lora_run(steps: Sequence[int] = (0, *EVERY_TEN)) -> MemorySource:
    return MemorySource({t: {name: linear_lora(10 * i, t) for i, name in enumerate("ab")} for t in steps})


def curved_lora_run(steps: Sequence[int] = (0, *EVERY_TEN), names: Sequence[str] = ("a", "b")) -> MemorySource:
    """Both factors move, along curves: factor space and merged space differ."""

    def at(seed: int, t: int) -> LoraFactors:
        A = noise(seed, 2, 5) + 0.01 * t * noise(seed + 1, 2, 5)
        return LoraFactors(A, t**0.8 * noise(seed + 2, 7, 2) + 0.001 * t**1.5 * noise(seed + 3, 7, 2), 2.0)

    return MemorySource({t: {name: at(10 * i, t) for i, name in enumerate(names)} for t in steps})


def resolve_dense(prediction: Prediction, name: str) -> Tensor:
    """W_hat - W_T of one parameter at alpha 1, dense (m, n); zero where nothing is predicted."""
    return dense(prediction.delta(name)).double()


def moved(prediction: Prediction) -> dict[str, Tensor]:
    """W_hat - W_T of every parameter with an update."""
    return {name: resolve_dense(prediction, name) for name in prediction.updates}


def same(a: Prediction, b: Prediction) -> bool:
    """Whether two predictions move the same parameters equally, bit for bit."""
    first, second = moved(a), moved(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def history(source: MemorySource, rank: int = 1, signs: int | None = None) -> History:
    return History(source, rank, RandomSigns(signs) if signs is not None else ExactCompressor())


def predicted_by(name: str, source: MemorySource, horizon: int = 30, view_rank: int = 1, **fields: Any) -> Prediction:
    """Make a predictor with these settings, fit it to the run and ask it for a horizon."""
    return make_predictor(name, **fields).fit(history(source, view_rank)).predict(horizon)
