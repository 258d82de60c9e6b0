"""Stage: training ``next-mlp``, an epoch at the widths of Qwen2.5-0.5B, and its small relative from start to end."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed import synthetic
from benchmarks.speed.clock import apart, best_of, cost_of
from benchmarks.speed.stage import Options, Result, Row, stage
from benchmarks.speed.synthetic import HORIZON, LoraRun

HIDDEN = 256
FEW, MANY = 2, 8
"""Epochs of the two trainings whose difference gives the seconds of one epoch without the set-up."""
REDUCED = "next-mlp-reduced"


@stage("next-mlp")
def next_mlp(options: Options) -> Result:
    """Seconds an epoch in each precision there is, and all 1000 epochs of the reduced one."""
    # Only the rank-1 components are read, and their size does not depend on the LoRA rank.
    run = LoraRun(replace(synthetic.QWEN_05B, layers=6), rank=8, distinct=6)
    if options.toy:
        run = replace(run, shapes=synthetic.TOY, rank=4)
    here = not options.toy
    rows: list[Row] = []
    with options.folder() as folder:
        run.write(folder / "checkpoints")
        loop, _ = apart(measure_loop, folder / "checkpoints", fresh=here)
        reference = {"what": "one checkpoint and one network at a time, plain AdamW, fp32", "how": "measured"} | loop
        for precision in _precisions():
            row, memory = apart(measure_epoch, folder / "checkpoints", precision, fresh=here)
            row = {"what": f"next-mlp, one epoch, {precision['precision'] or 'float32'}"} | row | memory
            floor = _floor(options, run, "bf16" if precision["precision"] == "bfloat16" else "fp32", row["cpu_s"])
            rows.append(row | {"target_cpu_s": 0.25, "floor": floor, "reference": reference})
        rows.append(_reduced(options, folder / "checkpoints", loop))
    samples = sum(len(run.steps) - HORIZON // 10 for _ in run.shapes.matrices())
    setting = {"matrices": len(run.shapes.matrices()), "samples": samples, "hidden": HIDDEN, "epochs": [FEW, MANY]}
    return Result(setting, rows)


def _precisions() -> list[dict[str, Any]]:
    """The settings of precision that the predictor has; None where it has none, and computes in float32."""
    from next_core import registry

    fields = registry().get("predictor", "next-mlp").config_class.model_fields
    return [{"precision": name} for name in ("float32", "bfloat16")] if "precision" in fields else [{"precision": None}]


def _reduced(options: Options, folder: Path, loop: dict[str, float]) -> Row:
    from next_core import registry

    what = f"{REDUCED}, all 1000 epochs"
    if REDUCED not in registry().names("predictor"):
        return {"what": what, "skipped": f"no predictor called {REDUCED} is installed"}
    row, memory = apart(measure_reduced, folder, 20 if options.toy else 1000, fresh=not options.toy)
    reference = {"what": "1000 epochs of the loop above: another, larger model", "cpu_s": 1000 * loop["cpu_s"]}
    reference["how"] = "estimated from one epoch"
    found: Row = {"what": what} | row | memory | {"target_cpu_s": 2.5, "reference": reference}
    return found


def _history(folder: Path) -> Any:
    """The run, its components known already: compressing is another stage's."""
    from next_core import History, open_checkpoints

    history = History(open_checkpoints(folder), rank=1)
    for kind in ("global", "local"):
        history.components(kind)
    history.components("target", HORIZON)
    return history


def measure_epoch(folder: Path, precision: dict[str, Any]) -> dict[str, Any]:
    """The difference of a long and a short training over the difference of their epochs; the median of three."""
    from next_core import make_predictor

    history = _history(folder)
    config = {key: value for key, value in precision.items() if value is not None}

    def train(epochs: int) -> tuple[float, float]:
        predictor = make_predictor("next-mlp", epochs=epochs, **config)
        cost, prediction = cost_of(lambda: predictor.fit(history).predict(HORIZON))
        assert prediction.updates or prediction.abstained
        return cost.cpu, cost.wall

    train(1)
    pairs = [(train(FEW), train(MANY)) for _ in range(3)]
    cpu, wall = ([(many[i] - few[i]) / (MANY - FEW) for few, many in pairs] for i in (0, 1))
    # A toy epoch is shorter than the clock's noise.
    middle = {"cpu_s": max(1e-6, statistics.median(cpu)), "wall_s": max(1e-6, statistics.median(wall))}
    row: dict[str, Any] = {key: float(f"{value:.4g}") for key, value in middle.items()}
    row["runs_cpu_s"] = [float(f"{value:.4g}") for value in cpu]
    set_up = [few[0] - FEW * each for (few, _), each in zip(pairs, cpu, strict=True)]
    return row | {"set_up_cpu_s": round(max(0.0, statistics.median(set_up)), 3)}


def measure_reduced(folder: Path, epochs: int) -> dict[str, Any]:
    """fit and predict, set-up included."""
    from next_core import make_predictor

    history = _history(folder)
    make_predictor(REDUCED, epochs=2).fit(history).predict(HORIZON)
    return best_of(3, lambda: make_predictor(REDUCED, epochs=epochs).fit(history).predict(HORIZON))[0]


def measure_loop(folder: Path) -> dict[str, float]:
    """One epoch as a plain script has it; the best of two after a warm-up.

    For each pair of checkpoints and each network: the vectors of all matrices of that length forward, the L1 loss,
    backward, gradients adding up; then one step of each network's own AdamW. u and v have networks of their own.
    """
    data = _samples(folder)
    networks = {key: _Network(key[1]) for key in data}
    optimizers = {
        key: torch.optim.AdamW(network.parameters(), 2e-5, foreach=False) for key, network in networks.items()
    }

    def epoch() -> None:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        pairs = next(iter(data.values()))[0].shape[1]
        for pair in range(pairs):
            for key, (inputs, target) in data.items():
                nn.functional.l1_loss(networks[key](inputs[:, pair]), target[pair]).div(pairs).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers.values():
            optimizer.step()

    epoch()
    row = best_of(2, epoch)[0]
    return {"cpu_s": row["cpu_s"], "wall_s": row["wall_s"]}


def _samples(folder: Path) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Per network the inputs (2, pairs, matrices, d) and the targets (pairs, matrices, d), fp32."""
    history = _history(folder)
    earlier = [i for i, _ in history.pairs(HORIZON)]
    parts = {
        kind: history.components(kind, HORIZON if kind == "target" else None) for kind in ("global", "local", "target")
    }
    gathered: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for name in history.names:
        vectors = {kind: dict(_vectors(factors[name])) for kind, factors in parts.items()}
        for part, target in vectors["target"].items():
            inputs = torch.stack([vectors[kind][part][earlier] for kind in ("global", "local")])
            gathered.setdefault((part, target.shape[-1]), []).append((inputs, target))
    return {
        key: (torch.stack([x for x, _ in some], 2), torch.stack([y for _, y in some], 1))
        for key, some in gathered.items()
    }


def _vectors(factors: Any) -> Iterator[tuple[str, Tensor]]:
    yield from (("u", factors.U[..., 0].float()), ("sigma", factors.S.float()), ("v", factors.V[..., 0].float()))


class _Network(nn.Module):
    """The published layout, written out."""

    def __init__(self, d: int) -> None:
        super().__init__()

        def block(wide: int, out: int) -> nn.Sequential:
            ends = nn.Linear(wide, HIDDEN), nn.Linear(HIDDEN, out)
            return nn.Sequential(ends[0], nn.Linear(HIDDEN, wide), nn.ReLU(), nn.Linear(wide, HIDDEN), ends[1])

        self.position, self.velocity, self.decoder = block(d, d), block(d, d), block(2 * d, d)

    def forward(self, inputs: Tensor) -> Tensor:
        together = torch.cat([self.position(inputs[0]), self.velocity(inputs[1])], -1)
        out: Tensor = self.decoder(together)
        return out


def _floor(options: Options, run: LoraRun, dtype: str, cpu_s: float) -> dict[str, Any]:
    """2 FLOPs a weight and sample forward, 4 backward (2 in an encoder's first layer, whose input needs no gradient).

    Traffic: AdamW reads weight, gradient and two moments and writes all but the gradient, 28 bytes a weight.
    """
    pairs = len(run.steps) - HORIZON // 10
    samples: dict[tuple[str, int], int] = {}
    for m, n in run.shapes.matrices().values():
        for key in (("u", m), ("sigma", 1), ("v", n)):
            samples[key] = samples.get(key, 0) + pairs
    weights = {d: (2 * 4 + 2 * 3 + 1) * HIDDEN * d for _, d in samples}
    flops = sum(count * (6 * weights[d] - 2 * 2 * HIDDEN * d) for (_, d), count in samples.items())
    return options.rates.floor(cpu_s, dtype, flops, 28 * sum(weights[d] for _, d in samples))
