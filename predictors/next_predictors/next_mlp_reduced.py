"""next-mlp-reduced: next-mlp in the few coordinates per matrix that its history spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from next_core.mathematics.low_rank import Factors, LowRank, truncated_svd
from next_predictors.component_networks import ComponentNetwork, NetworkConfig, Part
from next_predictors.next_mlp import ComponentPredictor, Components, fix_signs


class NextMlpReducedConfig(NetworkConfig):
    """Settings of next-mlp-reduced.

    The defaults of ``hidden``, ``epochs`` and ``lr`` are those that predict curved synthetic runs best in walk-forward
    tests. The paper's learning rate, 2e-5, hardly moves a network this small.
    """

    q: int = Field(12, ge=1, description="Coordinates per matrix and side: the number of basis vectors to keep")
    hidden: int = Field(64, ge=1, description="Width of the hidden layers")
    epochs: int = Field(300, ge=1, description="Full-batch epochs of training")
    lr: float = Field(3e-3, gt=0, description="AdamW's learning rate at the start")
    min_lr: float = Field(3e-5, ge=0, description="AdamW's learning rate at the end of the cosine")


class ReducedNetwork(ComponentNetwork):
    """One hidden layer per input and one for all.

    The paper's layers are bottlenecks of a long vector. Here d is small, and their ReLU over d units (one, for sigma)
    would often be dead; these have ``hidden`` units.
    """

    def __init__(self, length: int, inputs: int, hidden: int) -> None:
        super().__init__(length, inputs, hidden)
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(length, hidden), nn.ReLU()) for _ in range(inputs))
        self.decoder = nn.Sequential(nn.Linear(inputs * hidden, hidden), nn.ReLU(), nn.Linear(hidden, length))


@dataclass(frozen=True)
class Basis:
    """Coordinates of one matrix: orthonormal columns left (m, q) and right (n, q), and the unit of sigma.

    Columns are ordered by how much of the motion lies along them, and signed so that the newest global u (or v) has
    positive coordinates: coordinate i means the same in every matrix, whatever its size. Where the history spans fewer
    than q dimensions, the last columns are zero. The unit is the newest global sigma.
    """

    left: Tensor
    right: Tensor
    unit: Tensor

    @classmethod
    def of(cls, components: Mapping[str, Factors], q: int) -> Basis:
        """Build the basis from a matrix's observed global, local and target components."""
        positions, kinds = components["global"], list(components.values())
        unit = positions.S[-1].max().double()
        return cls(
            _directions([(f.U, f.S) for f in kinds], positions.U[-1, :, 0], q),
            _directions([(f.V, f.S) for f in kinds], positions.V[-1, :, 0], q),
            unit if unit > 0 else torch.ones_like(unit),
        )

    def encode(self, factors: Factors) -> Factors:
        """Return the components in this basis: U (T, q, k), S in units of the newest, V (T, q, k)."""
        U, V = self.left.mT @ factors.U.double(), self.right.mT @ factors.V.double()
        return Factors(U, factors.S.double() / self.unit, V, factors.energy, factors.nuclear)


class NextMLPReduced(ComponentPredictor):
    """NExt (arXiv 2604.11446) at a thousandth of the cost: coordinates instead of whole singular vectors.

    The u of a matrix's global, local and target components span about twice as many dimensions as there are
    checkpoints, and a few dimensions hold nearly all of the motion (diagnostics ``kept/u`` and ``kept/v``: their share
    of the observed targets' energy). The networks see the q coordinates in that basis, and sigma in units of the newest
    one; their output is mapped back. One network per component serves all matrices, whatever their size, so each learns
    from all. Motion outside the span of the history cannot be predicted.
    """

    name = "next-mlp-reduced"
    config_class = NextMlpReducedConfig
    network_class = ReducedNetwork
    _bases: Mapping[str, Basis]

    def encode(self, components: Components, figures: dict[str, float]) -> Components:
        names = components["target"]
        self._bases = {
            name: Basis.of({kind: group[name] for kind, group in components.items()}, self.config.q) for name in names
        }
        encoded: Components = {
            kind: {name: basis.encode(group[name]) for name, basis in self._bases.items()}
            for kind, group in components.items()
        }
        figures |= _kept(components["target"], encoded["target"])
        return fix_signs(encoded) if self.config.align else encoded

    def decode(self, name: str, found: Mapping[Part, Tensor]) -> Mapping[Part, Tensor]:
        basis = self._bases[name]
        return {"u": found["u"] @ basis.left.mT, "sigma": found["sigma"] * basis.unit, "v": found["v"] @ basis.right.mT}

    def length(self, size: int) -> int:
        return int(self.config.q)


def _directions(kinds: Sequence[tuple[Tensor, Tensor]], newest: Tensor, q: int) -> Tensor:
    """Return the leading left singular vectors, (d, q), of vectors (T, d, k) weighted by their sigma (T, k).

    Each kind of delta gets the same total weight; otherwise local deltas, which are short, would not count.
    """
    weighed = [(vectors.double() * sigma.double()[:, None, :]).transpose(0, 1).flatten(1) for vectors, sigma in kinds]
    # Left singular vectors only: right factor I, so the cost is linear in d, and no (d, d) matrix is formed.
    stacked = torch.cat([columns / columns.norm().clamp(min=torch.finfo(torch.float64).tiny) for columns in weighed], 1)
    found = truncated_svd(LowRank(stacked, torch.eye(stacked.shape[1], dtype=torch.float64)), q).U
    signs = torch.where(found.mT @ newest.double() < 0, -1.0, 1.0)
    return pad(found * signs, (0, q - found.shape[1]))


def _kept(targets: Mapping[str, Factors], encoded: Mapping[str, Factors]) -> dict[str, float]:
    """Return the share of the targets' energy whose u, or v, lies in the basis, over all matrices."""
    # |basis^T u| <= |u| = 1: its square, weighted by sigma^2, is the part of the energy that the coordinates keep.
    weights = {name: factors.S.double().square() for name, factors in targets.items()}
    whole = sum(float(weight.sum()) for weight in weights.values()) or 1.0
    kept_u = sum(float((encoded[name].U.square().sum(-2) * weight).sum()) for name, weight in weights.items())
    kept_v = sum(float((encoded[name].V.square().sum(-2) * weight).sum()) for name, weight in weights.items())
    return {"kept/u": kept_u / whole, "kept/v": kept_v / whole}
