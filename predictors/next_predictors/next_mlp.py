"""next-mlp: the predictor of NExt (arXiv 2604.11446), small networks over rank-k components of the deltas."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import l1_loss, normalize

from next_core import lowrank
from next_core.errors import ConfigError
from next_core.history import DeltaKind, History
from next_core.interfaces import LowRankUpdate, PluginConfig, Prediction, TrajectoryPredictor
from next_core.lowrank import Factors, LowRank

Key = tuple[Literal["u", "sigma", "v"], int]
"""What a network predicts: a component, and that vector's length d (1 for sigma)."""


class NextMlpConfig(PluginConfig):
    """The defaults are the paper's, except ``align``. Raises ``ConfigError`` for settings that contradict."""

    hidden: int = Field(256, ge=1, description="Width of the bottleneck layers")
    epochs: int = Field(1000, ge=1, description="Full-batch epochs of training")
    lr: float = Field(2e-5, gt=0, description="AdamW's learning rate at the start")
    min_lr: float = Field(2e-6, ge=0, description="The learning rate that the cosine ends at")
    seed: int = Field(0, ge=0, description="Seed of the networks' initial weights")
    align: bool = Field(True, description="Align signs over time; false: as the SVD left them, as released")
    use_global: bool = Field(True, description="Give the network the position, W_t - W_0")
    use_local: bool = Field(True, description="Give the network the velocity, W_t - W_{t-1}")
    patience: int | None = Field(None, ge=1, description="Stop a network after so many epochs without gain")
    device: str = Field("cpu", description="Where to train: cpu, cuda, cuda:1, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.use_global or self.use_local):
            raise ConfigError("next-mlp has nothing to read: set use_global or use_local to true")
        if self.min_lr > self.lr:
            raise ConfigError(f"next-mlp: min_lr {self.min_lr:g} is above lr {self.lr:g}; lower min_lr")
        return self


class Network(nn.Module):
    """Dec([Enc_G(x_G); Enc_L(x_L)]): c inputs of length d in, (c, N, d), the target component out, (N, d)."""

    def __init__(self, length: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(_layers(length, length, hidden) for _ in range(inputs))
        self.decoder = _layers(inputs * length, length, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        encoded = torch.cat([encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)], -1)
        output: Tensor = self.decoder(encoded)
        return output


def _layers(wide: int, out: int, hidden: int) -> nn.Sequential:
    """The paper's block: two bottlenecks of width ``hidden`` with one ReLU between them."""
    first, second = nn.Linear(wide, hidden), nn.Linear(hidden, wide)
    return nn.Sequential(first, second, nn.ReLU(), nn.Linear(wide, hidden), nn.Linear(hidden, out))


@dataclass
class _Group:
    """A network; N samples, inputs (c, N, d) and target (N, d); per matrix the newest inputs (c, k, d)."""

    network: Network
    inputs: Tensor
    target: Tensor
    newest: Mapping[str, Tensor]
    loss: float = math.inf
    epochs: int = 0
    best: float = math.inf
    best_epoch: int = 0

    def predict(self, name: str) -> Tensor:
        """The component of one matrix's next target, fp64 (k, d); zero where all inputs are."""
        with torch.no_grad():
            output: Tensor = self.network(self.newest[name]) * self.newest[name].any(-1, keepdim=True).any(0)
        return output.double().cpu()


class NextMlpPredictor(TrajectoryPredictor):
    """Predicts the rank-k components of W_{t+h} - W_t from those of W_t - W_0 and W_t - W_{t-1}.

    One network per component and length, shared by all matrices that have it; a u and a v of one length do not share,
    for the method has a predictor for each of u, sigma and v, and left and right vectors live in different spaces. Each
    singular index is a sample of its own, u_k and v_k going with sigma_k. A network's start depends on the seed and
    its key alone; the result depends neither on the order of the matrices nor, with ``align``, on the SVD's signs.

    Unlike the released code: signs are aligned, frozen matrices are left out, and a negative sigma counts as 0 (how
    many: diagnostic ``sigma_clamped``).
    """

    name = "next-mlp"
    config_class = NextMlpConfig
    requires = frozenset({"factors"})
    shares = True
    _history: History | None = None

    def fit(self, history: History) -> Self:
        self._history = history
        self._predictions: dict[int, Prediction] = {}
        return self

    def lacks(self, steps: Sequence[int], horizon: int) -> str | None:
        if any(step + horizon in steps for step in steps):
            return None
        missing = steps[0] + horizon
        return f"no two checkpoints lie {horizon} steps apart; observe one at step {missing}, or choose another horizon"

    def predict(self, horizon: int) -> Prediction:
        """Trains once for each horizon. Raises ``ConfigError`` before ``fit`` or for horizon < 1."""
        if self._history is None:
            raise ConfigError("next-mlp has no history yet; call fit(history) before predict")
        if horizon < 1:
            raise ConfigError(f"horizon must be at least 1 step (got {horizon})")
        if horizon not in self._predictions:
            self._predictions[horizon] = self._predict(self._history, horizon)
        return self._predictions[horizon]

    def _predict(self, history: History, horizon: int) -> Prediction:
        jumps: dict[str, LowRank] = {}
        abstained, figures = dict(history.frozen), {"sigma_clamped": 0.0}
        reason = self.lacks(history.steps, horizon)
        if not history.names:
            reason = "no matrix moved over the last interval: did training change the weights?"
        if reason is None:
            components = _read_components(history, horizon, self.config.align)
            groups = self._make_groups(components, [earlier for earlier, _ in history.pairs(horizon)])
            if groups:
                self._train(groups)
            for name in history.names:
                found = {part: group.predict(name) for (part, _), group in groups.items() if name in group.newest}
                if len(found) < 3:
                    abstained[name] = f"no matrix of its size moved over any observed {horizon} steps"
                    continue
                figures["sigma_clamped"] += float((found["sigma"] < 0).sum())
                U, S, V = normalize(found["u"]), found["sigma"].clamp(min=0), normalize(found["v"])
                if not bool((S * U).isfinite().all() and V.isfinite().all()):
                    abstained[name] = "training diverged: lower lr"
                elif not S.any():
                    abstained[name] = "the predicted sigma is not positive"
                else:
                    jumps[name] = LowRank((S * U).mT, V)
            figures |= _diagnostics(groups, list(jumps.values()), [components["target"][name] for name in jumps])
            reason = None if jumps else "; ".join(sorted({abstained[name] for name in history.names}))
        reason = reason and f"next-mlp: {reason}"
        updates = {name: LowRankUpdate(jump) for name, jump in jumps.items()}
        return Prediction(history.source, history.newest, horizon, "newest", updates, {}, abstained, reason, figures)

    def _make_groups(
        self, components: Mapping[DeltaKind, Mapping[str, Factors]], earlier: list[int]
    ) -> dict[Key, _Group]:
        """The networks and their samples, one per pair of checkpoints, matrix and singular index that moved."""
        device = _usable(self.config.device)
        used = [components[k] for k in ("global", "local") if getattr(self.config, f"use_{k}")]
        samples: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        newest: dict[Key, dict[str, Tensor]] = {}
        for name, target in sorted(components["target"].items()):
            alive = target.S > 0
            given = [_vectors(factors[name]) for factors in used]
            for key, wanted in _vectors(target).items():
                observed = torch.stack([vectors[key] for vectors in given])
                samples.setdefault(key, []).append((observed[:, earlier][:, alive], wanted[alive]))
                newest.setdefault(key, {})[name] = observed[:, -1].to(device)
        groups = {}
        for key in sorted(samples):
            inputs, targets = zip(*samples[key], strict=True)
            if any(map(len, targets)):
                with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reseed the GPUs too
                    torch.default_generator.manual_seed(self.config.seed + zlib.crc32(repr(key).encode()))
                    network = Network(key[1], len(used), self.config.hidden).to(device, torch.float32)
                x, y = torch.cat(inputs, 1).to(device), torch.cat(targets).to(device)
                groups[key] = _Group(network, x, y, newest[key])
        return groups

    def _train(self, groups: Mapping[Key, _Group]) -> None:
        """AdamW with a cosine, all networks in one step an epoch; with ``patience``, each may end early."""
        epochs, patience = self.config.epochs, self.config.patience or self.config.epochs
        weights = [weight for group in groups.values() for weight in group.network.parameters()]
        optimizer = torch.optim.AdamW(weights, self.config.lr, fused=weights[0].device.type in {"cpu", "cuda"})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, self.config.min_lr)
        active, epoch = list(groups.values()), 0
        while active:
            epoch += 1
            optimizer.zero_grad()
            with torch.enable_grad():
                losses = torch.stack([l1_loss(group.network(group.inputs), group.target) for group in active])
                losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if patience < epochs or epoch == epochs:  # reading a loss makes a GPU wait
                for group, loss in zip(active, losses.tolist(), strict=True):
                    group.loss, group.epochs = loss, epoch
                    if loss < group.best:
                        group.best, group.best_epoch = loss, epoch
                active = [group for group in active if epoch - group.best_epoch < patience and epoch < epochs]
            if self.progress is not None and (not active or epoch % 10 == 0):
                self.progress("train next-mlp", epoch if active else epochs, epochs)


def _usable(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"next-mlp cannot train on device '{device}': {error}; use cpu") from error


def _read_components(history: History, horizon: int, align: bool) -> dict[DeltaKind, Mapping[str, Factors]]:
    """Global, local and target components; with ``align``, of signs that do not depend on the SVD's.

    Alignment leaves each component one free sign, that of its newest global u: the sum of that u is made positive.
    """
    kinds: tuple[DeltaKind, ...] = get_args(DeltaKind)
    read = {kind: history.components(kind, horizon if kind == "target" else None, align) for kind in kinds}
    if not align:
        return read
    signs = {name: torch.where(f.U[-1].sum(0) < 0, -1.0, 1.0) for name, f in read["global"].items()}
    return {kind: {name: f.flip(signs[name]) for name, f in group.items()} for kind, group in read.items()}


def _vectors(factors: Factors) -> dict[Key, Tensor]:
    """Each component in fp32, (T, k, d)."""
    u, sigma, v = (x.float() for x in (factors.U.mT, factors.S[..., None], factors.V.mT))
    return {("u", u.shape[-1]): u, ("sigma", 1): sigma, ("v", v.shape[-1]): v}


def _diagnostics(groups: Mapping[Key, _Group], jumps: list[LowRank], targets: list[Factors]) -> dict[str, float]:
    """Per network the last epoch's L1 loss, that of predicting zero, and the epochs run.

    ``norm_ratio`` is |predicted| / mean over pairs of |target|, norms over all predicted matrices together.
    """
    figures: dict[str, float] = {}
    for (part, length), group in groups.items():
        figures[f"loss/{part}/{length}"] = group.loss
        figures[f"stay_loss/{part}/{length}"] = float(group.target.abs().mean())
        figures[f"epochs/{part}/{length}"] = group.epochs
    if jumps:
        predicted = sum(float(lowrank.norm(jump)) ** 2 for jump in jumps)
        observed = torch.stack([target.S.square().sum(-1) for target in targets]).sum(0).sqrt().mean()
        figures["norm_ratio"] = float(math.sqrt(predicted) / observed)
    return figures
