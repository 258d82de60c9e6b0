"""Checks of appliers: the promises of ``WeightApplier``, tested with updates whose weight delta is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from next_core.errors import NextCoreError
from next_core.interfaces import (
    Applied,
    CheckpointSource,
    CoefficientUpdate,
    LowRankUpdate,
    Prediction,
    Update,
    WeightApplier,
)
from next_core.mathematics.low_rank import LowRank, dense
from next_core.testing.check_runner import DoesNotApply, expect, expect_progress, expect_raises, global_state_unchanged
from next_core.testing.plugin_checks import check_set
from next_core.types import Anchor, Space

State = Mapping[str, Any]


@dataclass(frozen=True)
class ApplierCase:
    """An applier, and a run and a target to test it on.

    ``source`` is a run without jumps that has at least two checkpoints and two matrices that move. ``target()``
    returns a new ``out``: a live model at the newest checkpoint, or the path of a folder that does not exist.
    ``read(out)`` returns, after an apply, how far each parameter is from the backbone, dense (m, n). ``tolerance`` is
    the error allowed for rounding, relative to the size of the deltas.
    """

    plugin: WeightApplier
    source: CheckpointSource
    target: Callable[[], Any]
    read: Callable[[Any], Mapping[str, Tensor]]
    tolerance: float = 1e-4

    @property
    def newest(self) -> int:
        return self.source.steps[-1]

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.source.parameters]

    def make(self) -> WeightApplier:
        """Return a new applier of the same settings."""
        return type(self.plugin)(self.plugin.config)

    def moving(self) -> tuple[str, str]:
        """Return the first two matrices that moved over the run."""
        found = [name for name in self.names if bool(self.delta(name).any())]
        expect(len(found) > 1, "a run in which two matrices move", found)
        return found[0], found[1]

    def delta(self, name: str, since: int | None = None) -> Tensor:
        """Return how far a matrix moved until the newest checkpoint, dense (m, n), fp64."""
        return dense(self.source.delta(name, self.newest, since)).double()

    def random(self, name: str) -> LowRankUpdate:
        """Return an update of rank 2 with half the norm of what the matrix moved by."""
        whole, generator = self.delta(name), torch.Generator().manual_seed(len(name))
        (m, n), options = whole.shape, {"generator": generator, "dtype": torch.float64}
        left, right = torch.randn(m, 2, **options), torch.randn(2, n, **options)  # type: ignore[call-overload]
        return LowRankUpdate(LowRank(left * (0.5 * whole.norm() / (left @ right).norm()), right))

    def secant(self, space: Space = "merged") -> CoefficientUpdate:
        """Return the motion between the first and the newest checkpoint."""
        return CoefficientUpdate({self.newest: 1.0, self.source.steps[0]: -1.0}, space)

    def prediction(self, updates: Mapping[str, Update], anchor: Anchor = "newest", **fields: Any) -> Prediction:
        return Prediction(self.source, self.newest, 1, anchor, updates, **fields)

    def after(self, prediction: Prediction, alpha: float = 1.0) -> dict[str, Tensor]:
        """Apply a prediction to a new target, and return where each parameter is, (m, n)."""
        out = self.target()
        applied = self.make().apply(prediction, alpha, out=out)
        expect(isinstance(applied, Applied), "apply returns an Applied", type(applied).__name__)
        return {name: value.detach().double().clone() for name, value in self.read(out).items()}

    def expect_close(self, found: Tensor, wanted: Tensor, name: str, what: str) -> None:
        """Raise ``CheckError`` unless two deltas of one parameter agree up to rounding."""
        size = float(self.delta(name).norm() + wanted.norm())
        error = float((found.double() - wanted.double()).norm())
        seen = f"a delta of norm {float(found.norm()):.3g} that differs by {error:.3g}"
        expect(error <= self.tolerance * size, f"{what}, a delta of norm {float(wanted.norm()):.3g}", seen)


CHECKS = check_set("applier", WeightApplier)
check = CHECKS.add


def check_applier(case: ApplierCase, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of an applier. ``expected_failures`` and errors: see ``check_predictor``."""
    CHECKS.run(f"applier '{case.plugin.name}'", case, expected_failures)


@check
def moves_by_the_update(case: ApplierCase) -> None:
    """A parameter moves by alpha * confidence * update from its anchor: W_T + X, or W_0 + X with G_T counted once."""
    name, low = case.moving()[0], case.random(case.moving()[0])
    secant, whole = case.delta(name, case.source.steps[0]), case.delta(name)
    still = case.after(case.prediction({}))
    rows: list[tuple[Anchor, Update, float, float, Tensor]] = [
        ("newest", case.secant(), 1.0, 1.0, secant),
        ("newest", case.secant(), 0.25, 1.0, 0.25 * secant),
        ("newest", case.secant(), -1.0, 1.0, -secant),
        ("newest", case.secant(), 1.0, 0.25, 0.25 * secant),
        ("newest", case.secant(), 0.0, 1.0, 0 * secant),
        ("newest", low, 2.0, 1.0, 2.0 * low.matrix.dense()),
        ("newest", low, 1.0, 0.0, 0 * secant),
        ("backbone", CoefficientUpdate({case.newest: 1.5}), 1.0, 1.0, 0.5 * whole),
        ("backbone", low, 0.5, 1.0, 0.5 * (low.matrix.dense() - whole)),
        ("backbone", low, 0.0, 1.0, 0 * whole),
        *(("newest", case.secant("factors"), alpha, 1.0, _in_factor_space(case, name, alpha)) for alpha in (0.5, 2.0)),
    ]
    for anchor, update, alpha, confidence, wanted in rows:
        trust = {} if confidence == 1.0 else {name: confidence}
        after = case.after(case.prediction({name: update}, anchor, confidence=trust), alpha)
        what = f"{type(update).__name__} of '{name}', anchor {anchor}, alpha {alpha:g}, confidence {confidence:g}"
        case.expect_close(after[name] - still[name], wanted, name, what)


def _in_factor_space(case: ApplierCase, name: str, alpha: float) -> Tensor:
    """A and B each move by alpha times the weighted sum of their own values; without LoRA it means merged."""
    now, then = (case.source.factors(name, step) for step in (case.newest, case.source.steps[0]))
    if now is None or then is None:
        return alpha * case.delta(name, case.source.steps[0])
    A, B, A_1, B_1 = (x.double() for x in (now.A, now.B, then.A, then.B))
    return now.scaling * ((B + alpha * (B - B_1)) @ (A + alpha * (A - A_1)) - B @ A)


@check
def parameters_without_update_do_not_change(case: ApplierCase) -> None:
    """Without any update the result is the newest checkpoint; one update changes no bit of other parameters."""
    moving, still = case.moving()[0], case.after(case.prediction({}))
    for name in case.names:
        newest = dense(case.source.position(name, case.newest)).double()
        case.expect_close(still[name], newest, name, f"'{name}' at the newest checkpoint")
    for update in (case.secant(), case.random(moving)):
        after = case.after(case.prediction({moving: update}))
        moved = sorted(name for name in after if name != moving and not torch.equal(after[name], still[name]))
        expect(not moved, f"only '{moving}', which has an update, moves", f"{moved} move too")


@check
def rollback_restores_every_bit(case: ApplierCase) -> None:
    """`rollback` restores exactly what was there: a model's weights and buffers, or the absence of a folder."""
    first, second = case.moving()
    for updates in ({first: case.secant("factors"), second: case.secant()}, {first: case.random(first)}):
        out = case.target()
        before = _snapshot(out, case)
        applied = case.make().apply(case.prediction(updates), 1.5, out=out)
        expect(_difference(before, _snapshot(out, case)) is not None, "apply changes something", "nothing changed")
        applied.rollback()
        difference = _difference(before, _snapshot(out, case))
        expect(difference is None, "rollback restores the state from before", f"{difference} differs")


@check
def bad_updates_change_nothing(case: ApplierCase) -> None:
    """NaN, infinity, a wrong shape, an unknown matrix or step are errors of next-core, and no parameter moves."""
    first, second = case.moving()
    m, n = case.delta(second).shape
    spoilt = case.random(second)
    spoilt.matrix.left[0, 0] = torch.nan
    start, unknown = case.source.steps[0], case.newest + 1_000_003
    bad: dict[str, tuple[str, Update]] = {
        "NaN": (second, spoilt),
        "an infinite weight": (second, CoefficientUpdate({case.newest: math.inf, start: -1.0})),
        f"an update {(m + 1, n)} of a matrix {(m, n)}": (
            second,
            LowRankUpdate(LowRank(torch.ones(m + 1, 1), torch.ones(1, n))),
        ),
        "the unknown matrix 'no.such_matrix'": ("no.such_matrix", case.secant()),
        f"the unknown step {unknown}": (second, CoefficientUpdate({case.newest: 1.0, unknown: -1.0})),
    }
    for what, (name, update) in bad.items():
        prediction, out = case.prediction({first: case.secant(), name: update}), case.target()
        before = _snapshot(out, case)
        error = expect_raises(
            NextCoreError,
            lambda prediction=prediction, out=out: case.make().apply(prediction, out=out),  # type: ignore[misc]
            f"apply with {what}",
        )
        difference = _difference(before, _snapshot(out, case))
        expect(difference is None, f"apply with {what} changes nothing", f"{difference} differs")
        expect(name == second or name in str(error), f"an error that names '{name}'", error)


@check
def changes_only_its_target(case: ApplierCase) -> None:
    """The checkpoints and the trainer's global random states do not change; `progress` gets text, done and total."""
    first, second = case.moving()
    before = {name: case.delta(name).clone() for name in (first, second)}
    prediction = case.prediction({first: case.secant("factors"), second: case.random(second)})
    applier, out, calls = case.make(), case.target(), list[tuple[Any, ...]]()
    applier.progress = lambda *call: calls.append(call)
    with global_state_unchanged():
        applier.apply(prediction, out=out)
    for name, delta in before.items():
        expect(torch.equal(case.delta(name), delta), f"the checkpoints of '{name}' are unchanged", "other values")
    expect_progress(calls)


def _difference(before: State, after: State) -> str | None:
    """Return the first key that differs."""

    def same(key: str) -> bool:
        one, other = before.get(key), after.get(key)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return torch.equal(one, other)
        return one is not None and one == other

    return next((key for key in sorted({*before, *after}) if not same(key)), None)


def _snapshot(out: Any, case: ApplierCase) -> State:
    """Return all that an apply could change: a model's tensors and what trains, or a folder and its siblings."""
    if isinstance(out, nn.Module):
        tensors = [*out.named_parameters(), *out.named_buffers()]
        trains = {f"requires_grad of {name}": value.requires_grad for name, value in tensors}
        return trains | {name: value.detach().clone() for name, value in tensors}
    if isinstance(out, str | Path):
        folder = Path(out)
        siblings = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
        files = (path for path in folder.rglob("*") if path.is_file())
        return {"the parent folder": siblings} | {str(path.relative_to(folder)): path.read_bytes() for path in files}
    try:
        return {name: value.detach().clone() for name, value in case.read(out).items()}
    except NextCoreError as error:
        raise DoesNotApply(f"the target cannot be read before an apply: {error}") from error
