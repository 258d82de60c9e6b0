"""Checks of appliers: what ``WeightApplier`` says in words, asked of updates whose weight_delta is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
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
from next_core.testing.check_runner import DoesNotApply, expect, raises, register, run_checks
from next_core.testing.plugin_checks import register_common
from next_core.types import Anchor, Space

KIND: Final = "applier"


@dataclass(frozen=True)
class ApplierCase:
    """An applier, and what it is to write.

    ``source`` is a run of two checkpoints or more and two matrices or more, without jumps. ``target()`` makes a fresh
    ``out``: a live model that stands at the newest checkpoint, or a folder that does not exist. ``read(out)`` gives,
    after an apply, by how much each parameter differs from the backbone, dense (m, n). ``tolerance`` is the error that
    rounding may come to, relative to where the run stands.
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
        """A fresh one of the same settings."""
        return type(self.plugin)(self.plugin.config)

    def moving(self) -> list[str]:
        """The first matrices that moved over the run."""
        found = [p.name for p in self.source.parameters if bool(self.delta(p.name).any())]
        expect(len(found) > 1, "a run in which two matrices move", found)
        return found[:2]

    def delta(self, name: str, since: int | None = None) -> Tensor:
        return dense(self.source.delta(name, self.newest, since)).double()

    def random(self, name: str) -> LowRank:
        """A weight_delta of rank 2, half as long as what the run has moved by."""
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
        """The motion of the whole observed run again."""
        return CoefficientUpdate({self.newest: factor, self.source.steps[0]: -factor}, space)

    def after(self, prediction: Prediction, alpha: float = 1.0) -> dict[str, Tensor]:
        """Where everything is once a prediction was applied to a fresh target, (m, n) each."""
        out = self.target()
        applied = self.make().apply(prediction, alpha, out=out)
        expect(isinstance(applied, Applied), "apply answers with an Applied", type(applied).__name__)
        return {name: value.detach().double().clone() for name, value in self.read(out).items()}

    def moved(self, prediction: Prediction, alpha: float = 1.0) -> dict[str, Tensor]:
        """By how much an apply moves each parameter."""
        still, after = self.after(self.prediction({})), self.after(prediction, alpha)
        return {name: value - still[name] for name, value in after.items()}

    def expect_close(self, found: Tensor, wanted: Tensor, name: str, what: str) -> None:
        size = float(self.delta(name).norm() + wanted.norm())
        error = float((found.double() - wanted.double()).norm())
        seen = f"{float(found.norm()):.3g} long and off by {error:.3g}, where {float(wanted.norm()):.3g} is right"
        expect(error <= self.tolerance * size, what, seen)


def _case(case: ApplierCase) -> ApplierCase:
    return case


register_common(KIND, _case)
check = register(KIND, _case)


def check_applier(case: ApplierCase, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of an applier. ``expected_failures`` and errors: see ``check_predictor``."""
    run_checks(KIND, case, case, expected_failures, f"applier '{case.plugin.name}'")


@check
def nothing_predicted_is_where_the_run_stands(case: ApplierCase) -> None:
    """A prediction without updates leaves, or writes, the newest checkpoint as it is."""
    after = case.after(case.prediction({}))
    for parameter in case.source.parameters:
        stands = dense(case.source.position(parameter.name, case.newest)).double()
        case.expect_close(after[parameter.name], stands, parameter.name, f"'{parameter.name}' where the run stands")


@check
def alpha_zero_is_the_identity(case: ApplierCase) -> None:
    """With alpha 0 nothing moves, in either space and from either anchor."""
    first, second = case.moving()
    for anchor in ("newest", "backbone"):
        updates: dict[str, Update] = {first: case.secant(first), second: LowRankUpdate(case.random(second))}
        for name, by in case.moved(case.prediction(updates, anchor), 0.0).items():
            case.expect_close(by, 0 * by, name, f"'{name}' stays at alpha 0, anchor {anchor}")


@check
def coefficients_count_from_the_newest_checkpoint(case: ApplierCase) -> None:
    """anchor: newest. sum_i w_i G_{t_i} is added to W_T."""
    name = case.moving()[0]
    wanted = 0.5 * case.delta(name, case.source.steps[0])
    by = case.moved(case.prediction({name: case.secant(name, factor=0.5)}))[name]
    case.expect_close(by, wanted, name, f"'{name}' moves by half of W_T - W_{case.source.steps[0]}")


@check
def the_backbone_is_counted_once(case: ApplierCase) -> None:
    """anchor: backbone. W_0 + 1.5 (W_T - W_0) is half of G_T further than W_T, and not one and a half."""
    name = case.moving()[0]
    prediction = case.prediction({name: CoefficientUpdate({case.newest: 1.5})}, "backbone")
    case.expect_close(case.moved(prediction)[name], 0.5 * case.delta(name), name, f"'{name}' moves by half of G_T")


@check
def low_rank_updates_count_from_their_anchor(case: ApplierCase) -> None:
    """A low-rank X moves W_T by X from the newest checkpoint, and by X - G_T from the backbone."""
    name = case.moving()[0]
    update = case.random(name)
    for anchor, wanted in (("newest", update.dense()), ("backbone", update.dense() - case.delta(name))):
        by = case.moved(case.prediction({name: LowRankUpdate(update)}, anchor))[name]  # type: ignore[arg-type]
        case.expect_close(by, wanted, name, f"a low-rank update of '{name}' counted from the {anchor}")


@check
def factor_space_moves_the_factors(case: ApplierCase) -> None:
    """space: factors. A and B each move by alpha times the sum of their past values; without LoRA it means merged."""
    name, first = case.moving()[0], case.source.steps[0]
    now, then = case.source.factors(name, case.newest), case.source.factors(name, first)
    for alpha in (0.5, 2.0):
        if now is None or then is None:
            wanted = alpha * case.delta(name, first)
        else:
            A, B, A_1, B_1 = (x.double() for x in (now.A, now.B, then.A, then.B))
            wanted = now.scaling * ((B + alpha * (B - B_1)) @ (A + alpha * (A - A_1)) - B @ A)
        by = case.moved(case.prediction({name: case.secant(name, "factors")}), alpha)[name]
        case.expect_close(by, wanted, name, f"'{name}' moves in factor space at alpha {alpha:g}")


@check
def is_linear_in_alpha(case: ApplierCase) -> None:
    """In merged space the weight_delta is alpha times that of alpha 1; also a negative one."""
    first, second = case.moving()
    prediction = case.prediction({first: case.secant(first), second: LowRankUpdate(case.random(second))})
    once = case.moved(prediction)
    for alpha in (0.25, 2.0, -1.0):
        by = case.moved(prediction, alpha)
        for name in (first, second):
            case.expect_close(by[name], alpha * once[name], name, f"'{name}' at alpha {alpha:g} moves {alpha:g} times")


@check
def confidence_scales_alpha(case: ApplierCase) -> None:
    """A parameter moves by alpha times its confidence; one of confidence 0 stays."""
    first, second = case.moving()
    updates = {first: case.secant(first), second: case.secant(second)}
    whole = case.moved(case.prediction(updates))
    by = case.moved(case.prediction(updates, confidence={first: 0.25, second: 0.0}))
    case.expect_close(by[first], 0.25 * whole[first], first, f"'{first}' with confidence 0.25 moves a quarter")
    case.expect_close(by[second], 0 * whole[second], second, f"'{second}' with confidence 0 stays")


@check
def what_is_not_predicted_stays(case: ApplierCase) -> None:
    """A parameter without an update stays bit for bit where it is."""
    name = case.moving()[0]
    for update in (case.secant(name), LowRankUpdate(case.random(name))):
        still, after = case.after(case.prediction({})), case.after(case.prediction({name: update}))
        moved = sorted(other for other in after if other != name and not torch.equal(after[other], still[other]))
        expect(not moved, f"only '{name}', which has an update, moves", f"{moved} move as well")


@check
def rollback_restores_every_bit(case: ApplierCase) -> None:
    """`rollback` puts back exactly what was there: all weights and buffers of a model, or the absence of a folder."""
    first, second = case.moving()
    for updates in (
        {first: case.secant(first, "factors"), second: case.secant(second)},
        {first: LowRankUpdate(case.random(first))},
    ):
        out = case.target()
        before = _snapshot(out, case)
        applied = case.make().apply(case.prediction(updates), 1.5, out=out)
        expect(_different(before, _snapshot(out, case)) is not None, "apply changes something", "nothing changed")
        applied.rollback()
        _expect_untouched(before, out, case, "rollback restores it")


@check
def values_that_are_not_finite_change_nothing(case: ApplierCase) -> None:
    """NaN or infinity in one update is an error of next-core, and no parameter has moved."""
    first, second = case.moving()
    low = case.random(second)
    spoilt = LowRank(low.left.clone(), low.right)
    spoilt.left[0, 0] = torch.nan
    for bad in (LowRankUpdate(spoilt), CoefficientUpdate({case.newest: math.inf, case.source.steps[0]: -1.0})):
        _expect_refused(
            case, {first: case.secant(first), second: bad}, f"apply of {type(bad).__name__} with NaN or inf"
        )


@check
def a_wrong_shape_changes_nothing(case: ApplierCase) -> None:
    """An update of another shape is an error of next-core, and no parameter has moved."""
    first, second = case.moving()
    m, n = case.shape(second)
    bad = LowRankUpdate(LowRank(torch.ones(m + 1, 1), torch.ones(1, n)))
    _expect_refused(case, {first: case.secant(first), second: bad}, f"apply of {(m + 1, n)} to '{second}' {(m, n)}")


@check
def an_unknown_matrix_changes_nothing(case: ApplierCase) -> None:
    """An update of a matrix that the run does not have is an error of next-core, and no parameter has moved."""
    first = case.moving()[0]
    updates: dict[str, Update] = {first: case.secant(first), "no.such_matrix.weight": case.secant(first)}
    error = _expect_refused(case, updates, "apply of 'no.such_matrix.weight'")
    expect("no.such_matrix" in str(error), "an error that names the matrix", error)


@check
def an_unknown_step_changes_nothing(case: ApplierCase) -> None:
    """Weights of a step that was not observed are an error of next-core, and no parameter has moved."""
    first, second = case.moving()
    bad = CoefficientUpdate({case.newest: 1.0, case.newest + 1_000_003: -1.0})
    _expect_refused(case, {first: case.secant(first), second: bad}, f"apply of step {case.newest + 1_000_003}")


@check
def leaves_the_checkpoints_alone(case: ApplierCase) -> None:
    """The source reads as before, bit for bit."""
    names = [parameter.name for parameter in case.source.parameters]
    before = {name: case.delta(name).clone() for name in names}
    first, second = case.moving()
    case.after(case.prediction({first: case.secant(first, "factors"), second: LowRankUpdate(case.random(second))}))
    for name in names:
        expect(torch.equal(case.delta(name), before[name]), f"the checkpoints of '{name}' as before", "changed")


@check
def leaves_the_random_states_alone(case: ApplierCase) -> None:
    """Neither torch's, numpy's nor Python's global random state is drawn from or seeded: they are the trainer's."""

    def states() -> tuple[object, ...]:
        return torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    first, second = case.moving()
    out = case.target()
    before = states()
    prediction = case.prediction({first: case.secant(first), second: LowRankUpdate(case.random(second))})
    case.make().apply(prediction, out=out)
    expect(states() == before, "the global random states as before", "drawn from or seeded")


@check
def reports_progress_rightly(case: ApplierCase) -> None:
    """`progress(what, done, total)`, where it is called: words, and 0 <= done <= total."""
    told: list[tuple[object, ...]] = []
    applier = case.make()
    applier.progress = lambda *facts: told.append(facts)
    applier.apply(case.prediction({}), out=case.target())
    for facts in told:
        good = len(facts) == 3 and isinstance(facts[0], str) and 0 <= facts[1] <= facts[2]  # type: ignore[operator]
        expect(good, "progress(what, done, total) with 0 <= done <= total", facts)


State = Mapping[str, Any]


def _expect_refused(case: ApplierCase, updates: Mapping[str, Update], what: str) -> Exception:
    out = case.target()
    before = _snapshot(out, case)
    error = raises(NextCoreError, lambda: case.make().apply(case.prediction(updates), out=out), what)
    _expect_untouched(before, out, case, f"{what} changes nothing")
    return error


def _expect_untouched(before: State, out: Any, case: ApplierCase, what: str) -> None:
    different = _different(before, _snapshot(out, case))
    expect(different is None, what, f"{different} is not what it was")


def _different(before: State, after: State) -> str | None:
    """The first thing that differs."""
    for key in sorted({*before, *after}):
        if key not in before or key not in after:
            return key
        one, other = before[key], after[key]
        same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        if not same:
            return key
    return None


def _snapshot(out: Any, case: ApplierCase) -> State:
    """All that an apply could change: of a model its tensors and what trains, of a folder it and what is beside it."""
    if isinstance(out, nn.Module):
        named = {f"parameter {name}": value for name, value in out.named_parameters()}
        trains = {f"whether {name} trains": value.requires_grad for name, value in out.named_parameters()}
        buffers = {f"buffer {name}": value for name, value in out.named_buffers()}
        return trains | {key: value.detach().clone() for key, value in (named | buffers).items()}
    if isinstance(out, str | Path):
        there = Path(out)
        files = (path for path in there.rglob("*") if path.is_file())
        beside = sorted(path.name for path in there.parent.iterdir()) if there.parent.is_dir() else []
        return {"the folder's parent": beside} | {
            path.relative_to(there).as_posix(): path.read_bytes() for path in files
        }
    try:
        return {name: value.detach().clone() for name, value in case.read(out).items()}
    except NextCoreError as error:
        raise DoesNotApply(f"what it writes cannot be read before an apply: {error}") from error
