"""next-mlp: the predictor of NExt (arXiv 2604.11446), small networks over rank-k components of deltas."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from next_core.history.history import DeltaKind, History
from next_core.interfaces import LowRankUpdate, Prediction
from next_core.mathematics.low_rank import Factors, LowRank, norm
from next_core.predictor import TrajectoryPredictor, Work, no_checkpoints_apart
from next_predictors.component_networks import (
    ComponentNetwork,
    Group,
    Key,
    NetworkConfig,
    Part,
    Precision,
    make_groups,
    train,
    training_work,
)

Components = Mapping[DeltaKind, Mapping[str, Factors]]
"""Global, local and target components per matrix, one row per checkpoint (targets: per pair of checkpoints)."""


class NextMlpConfig(NetworkConfig):
    """Settings of next-mlp. The defaults are the paper's, except ``align``."""

    precision: Precision = Field(
        "float32",
        description="Precision of matrix products in training. bfloat16 is up to twice as fast on processors with "
        "instructions for it; weights and optimizer stay float32",
    )


class Network(ComponentNetwork):
    """The paper's layers: two bottlenecks in each encoder and two in the decoder."""

    def __init__(self, length: int, inputs: int, hidden: int) -> None:
        super().__init__(length, inputs, hidden)
        self.encoders = nn.ModuleList(_layers(length, length, hidden) for _ in range(inputs))
        self.decoder = _layers(inputs * length, length, hidden)


def _layers(wide: int, out: int, hidden: int) -> nn.Sequential:
    """Return the paper's block: two bottlenecks of width ``hidden`` with one ReLU between them."""
    first, second = nn.Linear(wide, hidden), nn.Linear(hidden, wide)
    return nn.Sequential(first, second, nn.ReLU(), nn.Linear(wide, hidden), nn.Linear(hidden, out))


class ComponentPredictor(TrajectoryPredictor):
    """Predicts the rank-k components of W_{t+h} - W_t from those of W_t - W_0 and W_t - W_{t-1}.

    There is one network per component and length, shared by all matrices with that length. A u and a v of equal length
    do not share one: the method has a predictor each for u, sigma and v, and left and right vectors live in different
    spaces. Each singular index is a sample, with u_k and v_k going with sigma_k. The result depends neither on the
    order of the matrices nor, with ``align``, on the SVD's signs.

    A subclass names the network and may change its coordinates (``encode``, ``decode`` and ``length``).
    """

    config_class = NetworkConfig
    requires = frozenset({"global", "local", "target"})
    shares = True
    network_class: ClassVar[type[ComponentNetwork]]

    def encode(self, components: Components, figures: dict[str, float]) -> Components:
        """Return the components in the networks' coordinates; may add to the diagnostics ``figures``."""
        return components

    def decode(self, name: str, found: Mapping[Part, Tensor]) -> Mapping[Part, Tensor]:
        """Return u (k, m), sigma (k, 1) and v (k, n) of one matrix from the networks' output."""
        return found

    def length(self, size: int) -> int:
        """Return the length of a network's vector for singular vectors of this length."""
        return size

    def fit(self, history: History) -> Self:
        self._predictions: dict[int, Prediction] = {}
        return super().fit(history)

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return no_checkpoints_apart(steps, horizon)

    def work(self, shapes: Mapping[str, tuple[int, int]], steps: Sequence[int], horizon: int, rank: int) -> Work:
        pairs = sum(step + horizon in steps for step in steps)
        samples: Counter[Key] = Counter()
        for m, n in shapes.values():
            for key in (("u", self.length(m)), ("sigma", 1), ("v", self.length(n))):
                samples[key] += pairs * min(rank, m, n)
        inputs = self.config.use_global + self.config.use_local
        return training_work(samples, inputs, self.network_class, self.config)

    def predict(self, horizon: int) -> Prediction:
        """See ``TrajectoryPredictor``. The networks are trained once per horizon."""
        self.check_horizon(horizon)
        history = self.history
        if horizon not in self._predictions:
            self._predictions[horizon] = self._predict(history, horizon)
        return self._predictions[horizon]

    def _predict(self, history: History, horizon: int) -> Prediction:
        jumps: dict[str, LowRank] = {}
        abstained, figures = dict(history.frozen), {"sigma_clamped": 0.0}
        reason = self.why_not(history.steps, horizon)
        if not history.names:
            reason = "no matrix moved over the last interval: did training change the weights?"
        if reason is None:
            components = _read_components(history, horizon, self.config.align)
            groups = self._fit_networks(self.encode(components, figures), history, horizon)
            for name in history.names:
                found = {part: group.predict(name) for (part, _), group in groups.items() if name in group.newest}
                if len(found) < 3:
                    abstained[name] = f"no matrix of its size moved between checkpoints {horizon} steps apart"
                    continue
                decoded = self.decode(name, found)
                u, sigma, v = decoded["u"], decoded["sigma"], decoded["v"]
                figures["sigma_clamped"] += float((sigma < 0).sum())
                # The networks return no unit vectors; sigma alone says how far. A negative one would reverse the jump.
                U, S, V = normalize(u), sigma.clamp(min=0), normalize(v)
                if not bool((S * U).isfinite().all() and V.isfinite().all()):
                    abstained[name] = "training the networks diverged; lower lr"
                elif not S.any():
                    abstained[name] = "the predicted sigma is not positive"
                else:
                    jumps[name] = LowRank((S * U).mT, V)
            figures |= _diagnostics(groups, list(jumps.values()), [components["target"][name] for name in jumps])
            reason = None if jumps else "; ".join(sorted({abstained[name] for name in history.names}))
        updates = {name: LowRankUpdate(jump) for name, jump in jumps.items()}
        return Prediction(history.source, history.newest, horizon, "newest", updates, {}, abstained, reason, figures)

    def _fit_networks(self, components: Components, history: History, horizon: int) -> dict[Key, Group]:
        earlier = [index for index, _ in history.pairs(horizon)]
        read = {"global": self.config.use_global, "local": self.config.use_local}
        inputs = [components[kind] for kind in get_args(DeltaKind) if read.get(kind)]
        groups = make_groups(inputs, components["target"], earlier, self.network_class, self.config)
        precision: Precision = getattr(self.config, "precision", "float32")
        train(list(groups.values()), self.config, precision, self.progress, f"train {self.name}")
        return groups


class NextMLP(ComponentPredictor):
    """NExt's predictor (arXiv 2604.11446): the networks read and predict whole singular vectors.

    Unlike the released code, it aligns signs, leaves out matrices that do not move, and treats a negative sigma as 0
    (diagnostic ``sigma_clamped`` counts them).
    """

    name = "next-mlp"
    space = "merged"
    config_class = NextMlpConfig
    network_class = Network


def _read_components(history: History, horizon: int, align: bool) -> Components:
    """Return global, local and target components; with ``align``, their signs do not depend on the SVD."""
    kinds: tuple[DeltaKind, ...] = get_args(DeltaKind)
    history.compress(*kinds, horizon=horizon)
    read = {kind: history.components(kind, horizon if kind == "target" else None, align) for kind in kinds}
    return fix_signs(read) if align else read


def fix_signs(components: Components) -> Components:
    """Fix the one sign that alignment leaves free per component: make the sum of its newest global u positive."""
    # u and v flip together, so each delta u sigma v^T stays what it is. One sign for all times keeps them aligned.
    signs = {name: torch.where(f.U[-1].sum(0) < 0, -1.0, 1.0) for name, f in components["global"].items()}
    return {kind: {name: f.flip(signs[name]) for name, f in group.items()} for kind, group in components.items()}


def _diagnostics(groups: Mapping[Key, Group], jumps: list[LowRank], targets: list[Factors]) -> dict[str, float]:
    """Return per network the last epoch's L1 loss, the loss of predicting zero, and the number of epochs.

    ``norm_ratio`` is |predicted| / (mean over pairs of |target|), with norms over all predicted matrices together.
    """
    figures: dict[str, float] = {}
    for (part, length), group in groups.items():
        figures[f"loss/{part}/{length}"] = group.loss
        figures[f"stay_loss/{part}/{length}"] = float(group.target.abs().mean())
        figures[f"epochs/{part}/{length}"] = group.epochs
    if jumps:
        predicted = sum(float(norm(jump)) ** 2 for jump in jumps)
        # |U S V^T|_F^2 is the sum of S^2, as U and V have orthonormal columns.
        observed = torch.stack([target.S.square().sum(-1) for target in targets]).sum(0).sqrt().mean()
        figures["norm_ratio"] = float(math.sqrt(predicted) / observed)
    return figures
