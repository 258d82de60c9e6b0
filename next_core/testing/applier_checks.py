"""Checks of appliers: the promises of ``WeightApplier``, tested with updates whose weight delta is known."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from next_core.errors import NextCoreError
from next_core.interfaces import CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction, Update, WeightApplier
from next_core.mathematics.low_rank import LowRank, dense
from next_core.testing import check_runner
from next_core.testing.check_runner import expect, expect_equal, expect_raises, global_state_unchanged
from next_core.types import Anchor, Space

TOLERANCE = 1e-4  # Error allowed for rounding, relative to the size of the deltas


@dataclass(frozen=True)
class ApplierCase:
    """An applier, and a run and a target to test it on.

    ``source`` is a run without jumps that has at least two checkpoints and two matrices that move. ``target()``
    returns a new ``out``: a live model at the newest checkpoint, or the path of a folder that does not exist.
    ``read(out)`` returns, after an apply, how far each parameter is from the backbone, dense (m, n).
    """

    plugin: WeightApplier
    source: CheckpointSource
    target: Callable[[], Any]
    read: Callable[[Any], Mapping[str, Tensor]]

    def make(self) -> WeightApplier:
        return type(self.plugin)(self.plugin.config)

    def moving(self) -> tuple[str, str]:
        """Return the first two matrices that moved over the run."""
        found = [parameter.name for parameter in self.source.parameters if self.delta(parameter.name).any()]
        expect(len(found) > 1, "a run in which two matrices move", found)
        return found[0], found[1]

    def delta(self, name: str) -> Tensor:
        """Return how far a matrix moved until the newest checkpoint, dense (m, n), fp64."""
        return dense(self.source.delta(name, self.source.steps[-1])).double()

    def low_rank(self, name: str) -> LowRankUpdate:
        """Return an update of rank 1 with half the norm of what the matrix moved by; all its values are equal."""
        (m, n), size = self.delta(name).shape, 0.5 * self.delta(name).norm()
        return LowRankUpdate(LowRank(torch.full((m, 1), float(size) / (m * n) ** 0.5), torch.ones(1, n)))

    def secant(self, space: Space = "merged") -> CoefficientUpdate:
        """Return the motion between the first and the newest checkpoint."""
        return CoefficientUpdate({self.source.steps[-1]: 1.0, self.source.steps[0]: -1.0}, space)

    def prediction(self, updates: Mapping[str, Update], anchor: Anchor = "newest", **fields: Any) -> Prediction:
        return Prediction(self.source, self.source.steps[-1], 1, anchor, updates, **fields)

    def after(self, prediction: Prediction, alpha: float = 1.0) -> dict[str, Tensor]:
        """Apply a prediction to a new target, and return where each parameter is, (m, n)."""
        out = self.target()
        with global_state_unchanged():
            self.make().apply(prediction, alpha, out=out)
        return {name: value.detach().double().clone() for name, value in self.read(out).items()}

    def expect_close(self, found: Tensor, wanted: Tensor, name: str, what: str) -> None:
        """Raise ``CheckError`` unless two deltas of one parameter agree up to rounding."""
        error, size = float((found - wanted).norm()), float(self.delta(name).norm() + wanted.norm())
        expect(error <= TOLERANCE * size, f"{what}, a delta of norm {float(wanted.norm()):.3g}", f"{error:.3g} off")


check = check_runner.checks_for("applier")


def check_applier(case: ApplierCase) -> None:
    """Run every check of an applier. Raises an ``ExceptionGroup`` of all failures."""
    check_runner.run_checks("applier", case.plugin.name, case)


@check
def moves_by_the_update(case: ApplierCase) -> None:
    """A parameter moves by what `Prediction.delta` says: W_T + X, or W_0 + X with the trained delta counted once.

    Parameters without an update, the checkpoints, and the trainer's global random states keep every bit.
    """
    name, newest, still = case.moving()[0], case.source.steps[-1], case.after(case.prediction({}))
    for other in still:
        position = dense(case.source.position(other, newest)).double()
        case.expect_close(still[other], position, other, f"without an update, '{other}' at the newest checkpoint")
    whole = case.delta(name)
    rows: list[tuple[Anchor, Update, float, float]] = [
        ("newest", case.secant(), 1.0, 1.0),
        ("newest", case.secant(), -1.0, 0.25),
        ("newest", case.secant(), 0.0, 1.0),
        ("newest", case.secant("factors"), 0.5, 1.0),
        ("newest", case.secant("factors"), 2.0, 1.0),
        ("newest", case.low_rank(name), 2.0, 1.0),
        ("newest", case.low_rank(name), 1.0, 0.0),
        ("backbone", CoefficientUpdate({newest: 1.5}), 1.0, 1.0),
        ("backbone", case.low_rank(name), 0.5, 1.0),
    ]
    for anchor, update, alpha, confidence in rows:
        prediction = case.prediction({name: update}, anchor, confidence={name: confidence})
        after, wanted = case.after(prediction, alpha), dense(prediction.delta(name, alpha)).double()
        what = f"{type(update).__name__} of '{name}', anchor {anchor}, alpha {alpha:g}, confidence {confidence:g}"
        case.expect_close(after.pop(name) - still[name], wanted, name, what)
        expect_equal(after, {other: still[other] for other in after}, f"only '{name}', which has an update, moves")
    expect(torch.equal(case.delta(name), whole), f"the checkpoints of '{name}' are unchanged", "other values")


@check
def rollback_restores_every_bit(case: ApplierCase) -> None:
    """`rollback` restores exactly what was there: a model's weights and buffers, or the absence of a folder."""
    first, second = case.moving()
    for updates in ({first: case.secant("factors"), second: case.secant()}, {first: case.low_rank(first)}):
        out = case.target()
        before = _snapshot(out)
        applied = case.make().apply(case.prediction(updates), 1.5, out=out)
        applied.rollback()
        expect_equal(before, _snapshot(out), "rollback restores the state from before")


@check
def bad_updates_change_nothing(case: ApplierCase) -> None:
    """NaN, infinity, a wrong shape, an unknown matrix or step are errors of next-core, and no parameter moves."""
    first, second = case.moving()
    m, n = case.delta(second).shape
    newest, start = case.source.steps[-1], case.source.steps[0]
    bad: dict[str, tuple[str, Update]] = {
        "NaN": (second, LowRankUpdate(LowRank(torch.full((m, 1), torch.nan), torch.ones(1, n)))),
        "an infinite weight": (second, CoefficientUpdate({newest: math.inf, start: -1.0})),
        "another shape": (second, LowRankUpdate(LowRank(torch.ones(m + 1, 1), torch.ones(1, n)))),
        "the unknown matrix 'no.such_matrix'": ("no.such_matrix", case.secant()),
        "an unknown step": (second, CoefficientUpdate({newest: 1.0, newest + 1_000_003: -1.0})),
    }
    for what, (name, update) in bad.items():
        prediction, out = case.prediction({first: case.secant(), name: update}), case.target()
        before = _snapshot(out)
        apply = functools.partial(case.make().apply, prediction, out=out)
        expect_raises(NextCoreError, apply, f"apply with {what}")
        expect_equal(before, _snapshot(out), f"apply with {what} changes nothing")


def _snapshot(out: Any) -> Mapping[str, Any]:
    """Return all that an apply could change: a model's tensors and what trains, or a folder and its siblings."""
    if isinstance(out, nn.Module):
        tensors = [*out.named_parameters(), *out.named_buffers()]
        trains = {f"requires_grad of {name}": value.requires_grad for name, value in tensors}
        return trains | {name: value.detach().clone() for name, value in tensors}
    folder = Path(out)
    siblings = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"the parent folder": siblings}
