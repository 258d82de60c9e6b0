"""Stage: the leading singular triplet of one large dense delta, as full-parameter runs have them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.clock import apart, best_of, cost_of
from benchmarks.speed.reference import Triplet, errors
from benchmarks.speed.stage import Options, Result, Row, stage
from benchmarks.speed.synthetic import seeded

SHAPE, TOY_SHAPE = (18944, 3584), (96, 64)
CASES = {
    "gap": "rank-1 signal in noise, the noise's edge at 0.98 of sigma_1",
    "pair": "sigma_2 = 0.98 sigma_1, then a spectrum that falls by a tenth each",
    "decay": "sigma_k as 1 / k",
}
GAP = 0.98
"""sigma_2 / sigma_1 of the two harder cases."""
SPECTRUM = 32
"""Directions in the two easier cases."""


@stage("dense-top1")
def dense_top1(options: Options) -> Result:
    """The largest matrix of Qwen2.5-7B, with three spectra."""
    m, n = TOY_SHAPE if options.toy else SHAPE
    rows = []
    for case, what in CASES.items():
        ours, memory = apart(measure_lanczos, case, m, n, 1, fresh=not options.toy)
        full, _ = apart(measure_full, case, m, n, fresh=not options.toy)
        randomised, _ = apart(measure_randomised, case, m, n, fresh=not options.toy)
        arpack, _ = apart(measure_arpack, case, m, n, fresh=not options.toy)
        row: Row = {"what": what} | ours["row"] | memory | {"target_cpu_s": 0.15}
        row["floor"] = options.rates.floor(row["cpu_s"], "fp32", 4.0 * m * n, 4.0 * m * n)
        row["errors"] = _errors(ours, full["truth"])
        row["reference"] = {"what": "torch.linalg.svd, fp32, whole"} | full["row"] | {"how": "measured once"}
        row["reference"]["errors"] = _errors(full, full["truth"])
        row["others"] = [
            {"what": what} | other["row"] | {"errors": _errors(other, full["truth"])}
            for what, other in (
                ("torch.svd_lowrank(q=6, niter=2)", randomised),
                ("scipy.sparse.linalg.svds(k=1, tol=1e-6)", arpack),
            )
        ]
        row["sigma_2_over_sigma_1"] = round(full["gap"], 4)
        rows.append(row)
    return Result({"shape": [m, n], "dtype": "float32", "gb": round(4e-9 * m * n, 3)}, rows)


def delta(case: str, m: int, n: int) -> Tensor:
    """An m x n delta in fp32 of a known kind of spectrum."""
    random = seeded(case)
    count = 1 if case == "gap" else min(SPECTRUM, m, n)
    U, V = (torch.linalg.qr(torch.randn(d, count, generator=random, dtype=torch.float64))[0].float() for d in (m, n))
    edge = math.sqrt(m) + math.sqrt(n)  # the largest singular value of unit noise
    if case == "gap":
        return torch.randn(m, n, generator=random).add_(_spike(edge / GAP, m, n) * U @ V.T)
    if case == "pair":
        sigma = edge / 0.3 * torch.tensor([1.0, *(GAP * 0.9**k for k in range(count - 1))])
        return torch.randn(m, n, generator=random).add_((U * sigma) @ V.T)
    sigma = 4 * edge / torch.arange(1, count + 1)  # the last ones lie below the noise
    return torch.randn(m, n, generator=random).mul_(0.25).add_((U * sigma) @ V.T)


def _spike(observed: float, m: int, n: int) -> float:
    """The signal theta that is seen as sigma_1 = sqrt((theta^2 + m)(theta^2 + n)) / theta in unit noise."""
    total, square = m + n - observed**2, m * n  # theta^4 + total theta^2 + square = 0
    return math.sqrt((-total + math.sqrt(total**2 - 4 * square)) / 2)


def measure_lanczos(case: str, m: int, n: int, rank: int) -> dict[str, Any]:
    """The compressor ``lanczos``, through its public name."""
    from next_core import make_compressor

    compressor = make_compressor("lanczos")
    compressor.compress([delta(case, *TOY_SHAPE)], rank)  # late imports, BLAS's first call
    matrix = delta(case, m, n)
    row, found = best_of(5, lambda: compressor.compress([matrix], rank))
    return {"row": row, "triplet": _numpy(found.U[0, :, 0], found.S[0, 0], found.V[0, :, 0])}


def measure_full(case: str, m: int, n: int) -> dict[str, Any]:
    """Every singular triplet, by LAPACK in fp32; and the leading one in fp64, found from there."""
    matrix = delta(case, m, n)
    torch.linalg.svd(torch.ones(8, 8))
    cost, (U, S, Vh) = cost_of(lambda: torch.linalg.svd(matrix, full_matrices=False))
    row = {"cpu_s": float(f"{cost.cpu:.4g}"), "wall_s": float(f"{cost.wall:.4g}")}
    found = {"row": row, "triplet": _numpy(U[:, 0], S[0], Vh[0]), "gap": float(S[1] / S[0])}
    return found | {"truth": _numpy(*_refined(matrix.double(), Vh[0].double(), float(S[0])))}


def _refined(matrix: Tensor, v: Tensor, sigma: float) -> Triplet:
    """The triplet next to a start that is good to fp32: Lanczos in fp64 until its residual is 1e-12 of sigma."""
    from scipy.sparse.linalg import svds

    found = svds(matrix.numpy(), k=1, tol=1e-12, v0=v.numpy())
    U, S, V = (torch.from_numpy(x.copy()) for x in found)
    triplet = U[:, 0], S[0], V[0]
    residual = (matrix @ triplet[2] - S * triplet[0]).norm() + (matrix.T @ triplet[0] - S * triplet[2]).norm()
    if residual > 1e-11 * sigma or abs(S[0] - sigma) > 1e-4 * sigma:
        raise ArithmeticError(f"no fp64 reference: residual {float(residual):g}, sigma {float(S[0])} beside {sigma}")
    return triplet


def measure_arpack(case: str, m: int, n: int) -> dict[str, Any]:
    """Lanczos by ARPACK, through SciPy, at the tolerance of ours."""
    from scipy.sparse.linalg import svds

    matrix = delta(case, m, n).numpy()
    start = torch.randn(min(m, n), generator=seeded("start")).numpy()
    svds(matrix[:64, :48], k=1, tol=1e-6)
    row, found = best_of(2, lambda: svds(matrix, k=1, tol=1e-6, v0=start))
    U, S, V = (torch.from_numpy(x.copy()) for x in found)
    return {"row": row, "triplet": _numpy(U[:, 0], S[0], V[0])}


def measure_randomised(case: str, m: int, n: int) -> dict[str, Any]:
    """A randomised SVD with PyTorch's defaults."""
    matrix = delta(case, m, n)
    torch.manual_seed(0)
    row, (U, S, V) = best_of(3, lambda: torch.svd_lowrank(matrix))
    return {"row": row, "triplet": _numpy(U[:, 0], S[0], V[:, 0])}


def _errors(found: dict[str, Any], truth: tuple[Any, ...]) -> dict[str, float]:
    given, exact = (tuple(map(torch.as_tensor, triplet)) for triplet in (found["triplet"], truth))
    return {key: float(f"{value:.2g}") for key, value in errors(given, exact).items()}


def _numpy(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.double().numpy() for tensor in tensors)
