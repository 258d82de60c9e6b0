"""Checks of appliers: the promises of ``WeightApplier``, tested with updates whose weight delta is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

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

    def make(self) -> WeightApplier:
        """Return a new applier of the same settings."""
        return type(self.plugin)(self.plugin.config)

    def moving(self) -> tuple[str, str]:
        """Return the first two matrices that moved over the run."""
        found = [p.name for p in self.source.parameters if bool(self.delta(p.name).any())]
        expect(len(found) > 1, "a run in which two matrices move", found)
        return found[0], found[1]

    def delta(self, name: str, since: int | None = None) -> Tensor:
        """Return how far a matrix moved until the newest checkpoint, dense (m, n), fp64."""
        return dense(self.source.delta(name, self.newest, since)).double()

    def random(self, name: str) -> LowRank:
        """Return a delta of rank 2 with half the norm of what the matrix moved by."""
        (m, n), generator = self.shape(name), torch.Generator().manual_seed(len(name))
        left, right = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, 2), (2, n)))
        return LowRank(left * (0.5 * self.delta(name).norm() / (left @ right).norm()), right)

    def shape(self, name: str) -> tuple[int, int]:
        return next(p.shape for p in self.source.parameters if p.name == name)

    def prediction(
        self, updates: Mapping[str, Update], anchor: Anchor = "newest", confidence: Mapping[str, float] | None = None
    ) -> Prediction:
        return Prediction(self.source, self.newest, 1, anchor, updates, confidence or {})

    def secant(self, name: str, space: Space = "merged", factor: float = 1.0) -> CoefficientUpdate:
        """Return ``factor`` times the motion between the first and the newest checkpoint."""
        return CoefficientUpdate({self.newest: factor, self.source.steps[0]: -factor}, space)

    def after(self, prediction: Prediction, alpha: float = 1.0) -> dict[str, Tensor]:
        """Apply a prediction to a new target, and return where each parameter is, (m, n)."""
        out = self.target()
        applied = self.make().apply(prediction, alpha, out=out)
        expect(isinstance(applied, Applied), "apply returns an Applied", type(applied).__name__)
        return {name: value.detach().double().clone() for name, value in self.read(out).items()}

    def moved(self, prediction: Prediction, alpha: float = 1.0) -> dict[str, Tensor]:
        """Return how far an apply moves each parameter, (m, n)."""
        still, after = self.after(self.prediction({})), self.after(prediction, alpha)
        return {name: value - still[name] for name, value in after.items()}

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
def no_update_and_alpha_zero_keep_the_newest_checkpoint(case: ApplierCase) -> None:
    """Without updates, or with alpha 0, the result is the newest checkpoint."""
    after = case.after(case.prediction({}))
    for name in (parameter.name for parameter in case.source.parameters):
        newest = dense(case.source.position(name, case.newest)).double()
        case.expect_close(after[name], newest, name, f"'{name}' at the newest checkpoint")
    first, second = case.moving()
    for anchor in get_args(Anchor):
        updates: dict[str, Update] = {first: case.secant(first), second: LowRankUpdate(case.random(second))}
        for name, by in case.moved(case.prediction(updates, anchor), 0.0).items():
            case.expect_close(by, 0 * by, name, f"'{name}' does not move at alpha 0, anchor {anchor}")


@check
def updates_count_from_their_anchor(case: ApplierCase) -> None:
    """anchor newest: W_T + X. anchor backbone: W_0 + X, so W_T moves by X - G_T and G_T is counted once."""
    name = case.moving()[0]
    low, whole = case.random(name), case.delta(name)
    cases: list[tuple[Anchor, Update, Tensor]] = [
        ("newest", case.secant(name, factor=0.5), 0.5 * case.delta(name, case.source.steps[0])),
        ("backbone", CoefficientUpdate({case.newest: 1.5}), 0.5 * whole),
        ("newest", LowRankUpdate(low), low.dense()),
        ("backbone", LowRankUpdate(low), low.dense() - whole),
    ]
    for anchor, update, wanted in cases:
        by = case.moved(case.prediction({name: update}, anchor))[name]
        case.expect_close(by, wanted, name, f"a {type(update).__name__} of '{name}' from anchor {anchor}")


@check
def factor_space_moves_the_factors(case: ApplierCase) -> None:
    """space factors: A and B each move by alpha times the weighted sum of their own values; without LoRA, as merged."""
    name, first = case.moving()[0], case.source.steps[0]
    now, then = case.source.factors(name, case.newest), case.source.factors(name, first)
    for alpha in (0.5, 2.0):
        if now is None or then is None:
            wanted = alpha * case.delta(name, first)
        else:
            A, B, A_1, B_1 = (x.double() for x in (now.A, now.B, then.A, then.B))
            wanted = now.scaling * ((B + alpha * (B - B_1)) @ (A + alpha * (A - A_1)) - B @ A)
        by = case.moved(case.prediction({name: case.secant(name, "factors")}), alpha)[name]
        case.expect_close(by, wanted, name, f"'{name}' in factor space at alpha {alpha:g}")


@check
def alpha_and_confidence_scale_the_delta(case: ApplierCase) -> None:
    """In merged space a parameter moves by alpha * confidence times its update, also for a negative alpha."""
    first, second = case.moving()
    updates: dict[str, Update] = {first: case.secant(first), second: LowRankUpdate(case.random(second))}
    once = case.moved(case.prediction(updates))
    for alpha, trust in ((0.25, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, 0.25), (1.0, 0.0)):
        by = case.moved(case.prediction(updates, confidence={second: trust} if trust != 1.0 else {}), alpha)
        case.expect_close(by[first], alpha * once[first], first, f"'{first}' at alpha {alpha:g}")
        what = f"'{second}' at alpha {alpha:g}, confidence {trust:g}"
        case.expect_close(by[second], alpha * trust * once[second], second, what)


@check
def unpredicted_parameters_do_not_change(case: ApplierCase) -> None:
    """A parameter without an update does not change, bit for bit."""
    name = case.moving()[0]
    still = case.after(case.prediction({}))
    for update in (case.secant(name), LowRankUpdate(case.random(name))):
        after = case.after(case.prediction({name: update}))
        moved = sorted(other for other in after if other != name and not torch.equal(after[other], still[other]))
        expect(not moved, f"only '{name}', which has an update, moves", f"{moved} move too")


@check
def rollback_restores_every_bit(case: ApplierCase) -> None:
    """`rollback` restores exactly what was there: a model's weights and buffers, or the absence of a folder."""
    first, second = case.moving()
    for updates in (
        {first: case.secant(first, "factors"), second: case.secant(second)},
        {first: LowRankUpdate(case.random(first))},
    ):
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
    m, n = case.shape(second)
    spoilt = case.random(second)
    spoilt.left[0, 0] = torch.nan
    start, unknown = case.source.steps[0], case.newest + 1_000_003
    bad: dict[str, tuple[str, Update]] = {
        "NaN": (second, LowRankUpdate(spoilt)),
        "an infinite weight": (second, CoefficientUpdate({case.newest: math.inf, start: -1.0})),
        f"an update {(m + 1, n)} of a matrix {(m, n)}": (
            second,
            LowRankUpdate(LowRank(torch.ones(m + 1, 1), torch.ones(1, n))),
        ),
        "the unknown matrix 'no.such_matrix'": ("no.such_matrix", case.secant(first)),
        f"the unknown step {unknown}": (second, CoefficientUpdate({case.newest: 1.0, unknown: -1.0})),
    }
    for what, (name, update) in bad.items():
        prediction, out = case.prediction({first: case.secant(first), name: update}), case.target()
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
    prediction = case.prediction({first: case.secant(first, "factors"), second: LowRankUpdate(case.random(second))})
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
