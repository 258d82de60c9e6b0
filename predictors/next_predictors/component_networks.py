"""Networks that predict components of deltas: samples, settings and training. One per component and length."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from next_core.errors import contradiction, invalid_value
from next_core.mathematics.low_rank import Factors
from next_core.predictor import Work
from next_core.settings import Settings
from next_core.types import Progress

Part = Literal["u", "sigma", "v"]
Key = tuple[Part, int]  # What a network predicts: a component and its length d (1 for sigma)
Precision = Literal["float32", "bfloat16"]


class NetworkConfig(Settings):
    """Settings of the component predictors. The defaults are the paper's, except ``align``.

    Raises ``ConfigError`` for settings that contradict each other.
    """

    hidden: int = Field(256, ge=1, description="Width of the bottleneck layers")
    epochs: int = Field(1000, ge=1, description="Full-batch epochs of training")
    lr: float = Field(2e-5, gt=0, description="AdamW's learning rate at the start")
    min_lr: float = Field(2e-6, ge=0, description="AdamW's learning rate at the end of the cosine")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the networks' initial weights")
    align: bool = Field(True, description="Align signs over time; false: keep the SVD's, as the released code does")
    use_global: bool = Field(True, description="Give the network the position, W_t - W_0")
    use_local: bool = Field(True, description="Give the network the velocity, W_t - W_{t-1}")
    patience: int | None = Field(None, ge=1, description="Stop a network after this many epochs without improvement")
    device: str = Field("cpu", description="Where to train: cpu, cuda, cuda:1, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.use_global or self.use_local):
            raise contradiction("the networks have no input: set use_global or use_local to true")
        if self.min_lr > self.lr:
            raise contradiction(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; lower min_lr")
        return self


class ComponentNetwork(nn.Module):
    """Dec([Enc_G(x_G); Enc_L(x_L)]): c inputs (c, N, d) to the target component (N, d).

    A subclass builds its layers from d (``length``), c (``inputs``) and the config's ``hidden``.
    """

    encoders: nn.ModuleList
    decoder: nn.Module

    def __init__(self, length: int, inputs: int, hidden: int) -> None:
        super().__init__()

    def forward(self, inputs: Tensor) -> Tensor:
        encoded = torch.cat([encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)], -1)
        output: Tensor = self.decoder(encoded)
        return output


@dataclass
class Group:
    """A network with its N samples, inputs (c, N, d) and target (N, d), and per matrix the newest inputs (c, k, d)."""

    network: ComponentNetwork
    inputs: Tensor
    target: Tensor
    newest: Mapping[str, Tensor]
    loss: float = math.inf
    epochs: int = 0
    best: float = math.inf
    best_epoch: int = 0

    def predict(self, name: str) -> Tensor:
        """Predict the component of one matrix's next target, fp64 (k, d); zero where all inputs are zero."""
        with torch.no_grad():
            output: Tensor = self.network(self.newest[name]) * self.newest[name].any(-1, keepdim=True).any(0)
        return output.double().cpu()


def make_groups(
    inputs: Sequence[Mapping[str, Factors]],
    targets: Mapping[str, Factors],
    earlier: Sequence[int],
    network_class: type[ComponentNetwork],
    config: NetworkConfig,
) -> dict[Key, Group]:
    """Build the networks and their samples: one per pair of checkpoints, matrix and singular index that moved.

    ``inputs`` have a row per checkpoint, ``targets`` one per pair, which starts at checkpoint ``earlier[row]``. A
    network's initial weights depend only on the seed and its key, and its samples not on the order of the matrices.
    """
    device = _usable(config.device)
    samples: dict[Key, list[tuple[Tensor, Tensor]]] = {}
    newest: dict[Key, dict[str, Tensor]] = {}
    rows = list(earlier)
    for name, target in sorted(targets.items()):
        alive = target.S > 0  # where sigma is 0, u and v are zero columns and no direction to learn
        given = [_vectors(factors[name]) for factors in inputs]
        for key, wanted in _vectors(target).items():
            observed = torch.stack([vectors[key] for vectors in given])
            samples.setdefault(key, []).append((observed[:, rows][:, alive], wanted[alive]))
            newest.setdefault(key, {})[name] = observed[:, -1].to(device)
    groups = {}
    for key in sorted(samples):
        seen, wanted_each = zip(*samples[key], strict=True)
        if any(map(len, wanted_each)):
            with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reseed the GPUs too
                torch.default_generator.manual_seed(config.seed + zlib.crc32(repr(key).encode()))
                network = network_class(key[1], len(inputs), config.hidden).to(device, torch.float32)
            x, y = torch.cat(seen, 1).to(device), torch.cat(wanted_each).to(device)
            groups[key] = Group(network, x, y, newest[key])
    return groups


def train(
    groups: Sequence[Group], config: NetworkConfig, precision: Precision, progress: Progress | None, what: str
) -> None:
    """Train every network once per epoch with AdamW and a cosine schedule; with ``patience``, each may stop early.

    ``bfloat16`` concerns matrix products only; weights, gradients, AdamW and the loss stay float32.
    """
    epochs, patience = config.epochs, config.patience or config.epochs
    active = [(group, *_optimizer(group.network, config)) for group in groups]
    epoch = 0
    while active:
        epoch += 1
        losses = []
        for group, optimizer, schedule in active:  # one network's gradients at a time: faster, and less memory
            with torch.enable_grad():
                with torch.autocast(group.target.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    loss = l1_loss(group.network(group.inputs), group.target)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        if patience < epochs or epoch == epochs:  # reading a loss synchronises a GPU
            for (group, *_), value in zip(active, torch.stack(losses).tolist(), strict=True):
                group.loss, group.epochs = value, epoch
                if value < group.best:
                    group.best, group.best_epoch = value, epoch
            active = [entry for entry in active if epoch - entry[0].best_epoch < patience and epoch < epochs]
        if progress is not None and (not active or epoch % 10 == 0):
            progress(what, epoch if active else epochs, epochs)


def training_work(
    samples: Mapping[Key, int], inputs: int, network_class: type[ComponentNetwork], config: NetworkConfig
) -> Work:
    """Estimate ``train``: per epoch, 6 operations per weight and sample, and 28 bytes per weight for AdamW."""
    work = Work()
    for (_, length), count in samples.items():
        if count:
            with torch.device("meta"):
                weights = sum(w.numel() for w in network_class(length, inputs, config.hidden).parameters())
            work += Work(bytes=28.0 * weights, single_flops=6.0 * weights * count).times(config.epochs)
    return work


def _optimizer(
    network: ComponentNetwork, config: NetworkConfig
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.CosineAnnealingLR]:
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, config.lr, fused=weights[0].device.type in {"cpu", "cuda"})
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs, config.min_lr)


def _usable(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise invalid_value(f"cannot train on device '{device}': {error}; use cpu") from error


def _vectors(factors: Factors) -> dict[Key, Tensor]:
    """Return each component in fp32, (T, k, d)."""
    u, sigma, v = (x.float() for x in (factors.U.mT, factors.S[..., None], factors.V.mT))
    return {("u", u.shape[-1]): u, ("sigma", 1): sigma, ("v", v.shape[-1]): v}
