"""The optimizer steps of a live model: their multiple, what is compared, averaged, saved and loaded."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from next_core.live_weights.live_model import LiveModel
from next_core.live_weights.optimizer_steps import OptimizerSteps, sample_indices
from next_core.live_weights.trained_weights import WholeWeights
from tests.errors import raises_kind
from tests.live_weights.matrix_run import SHAPE, Run


def test_the_multiple_scales_the_step_and_the_scheduler_does_not_see_it() -> None:
    plain, scaled = Run(), Run()
    scaled.steps.multiple = 3.0
    scheduler = torch.optim.lr_scheduler.LinearLR(scaled.optimizer, 1.0, 0.5, total_iters=2)
    gradient = torch.randn(SHAPE)
    plain.step(gradient)
    scaled.step(gradient)
    torch.testing.assert_close(scaled.weight, 3 * plain.weight)
    assert scaled.optimizer.param_groups[0]["lr"] == scaled.steps.learning_rate == 0.1
    scheduler.step()
    assert scaled.optimizer.param_groups[0]["lr"] == pytest.approx(0.075)
    scaled.steps.close()
    before = scaled.weight
    scaled.step(gradient)
    assert float((scaled.weight - before).abs().max()) == pytest.approx(0.075, rel=0.1)


def test_motions_are_the_preconditioned_gradients_whatever_rate_and_multiple_moved_them() -> None:
    """With beta_2 = 0 Adam divides by |g| of the same step, so the motion of a block is the sum of signs, exactly."""
    run = Run(betas=(0.9, 0.0), eps=1e-12)
    scale = torch.ones(SHAPE)
    gradients = [scale * sign for sign in (1, 1, -1, 1)]
    for number, gradient in enumerate(gradients):
        run.steps.multiple = (1.0, 7.0)[number % 2]
        run.step(gradient)
        run.steps.end_block()
    products = run.steps.products()
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0]).double()
    cosines = products / products.diagonal().sqrt().outer(products.diagonal().sqrt())
    torch.testing.assert_close(cosines, signs.outer(signs), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        products.diagonal().sqrt() / products[0, 0].sqrt(), torch.ones(4).double(), atol=1e-4, rtol=0
    )


def test_noise_without_a_signal_agrees_by_momentum_only_where_momentum_is_left_in() -> None:
    run, motions, before = Run(rate=1e-3, betas=(0.9, 0.999)), [], None
    generator, cosines, naive = torch.Generator().manual_seed(0), [], []
    for number in range(1, 2001):
        run.step(torch.randn(SHAPE, generator=generator))
        if number % 10 == 0:
            run.steps.end_block()
            motions.append(run.weight - (0 if before is None else before))
            before = run.weight
            products = run.steps.products()
            if len(motions) > 20:
                cosines.append(float(products[-1, -2] / (products[-1, -1] * products[-2, -2]).sqrt()))
                naive.append(float(torch.cosine_similarity(motions[-1].ravel(), motions[-2].ravel(), dim=0)))
    assert abs(sum(cosines) / len(cosines)) < 0.06
    assert sum(naive) / len(naive) > 0.4


def test_the_mean_is_that_of_all_steps_until_the_window_is_full_and_is_undone_bit_for_bit() -> None:
    run = Run(windows=(5,))
    wanted = run.weight
    for count in range(1, 7):
        run.train(count, 1)
        wanted = wanted + (run.weight - wanted) * max(1 / 3, 1 / count)
    before = run.weight
    applied = run.steps.apply_mean(5)
    torch.testing.assert_close(run.weight, wanted)
    applied.rollback()
    assert torch.equal(run.weight, before)


def test_a_run_that_goes_on_from_its_mean_does_not_count_the_way_there_as_motion() -> None:
    plain, moved = Run(windows=(5,)), Run(windows=(5,))
    for one in (plain, moved):
        for _ in range(9):
            one.step(torch.ones(SHAPE))
        if one is moved:
            one.steps.apply_mean(5)
        one.step(torch.ones(SHAPE))
        one.steps.end_block()
    assert float((moved.weight - plain.weight).abs().max()) > 0.1
    torch.testing.assert_close(moved.steps.products(), plain.steps.products(), rtol=1e-5, atol=0)


def test_a_run_that_is_resumed_without_its_moments_measures_as_a_new_one_does(tmp_path: Path) -> None:
    run, other, new = Run(), Run(), Run()
    run.train(1, 9)
    run.steps.end_block()
    run.steps.save(tmp_path)
    other.model.load_state_dict(run.model.state_dict())
    other.steps.load(tmp_path)
    for one in (other, new):
        one.train(2, 5)
        one.steps.end_block()
    torch.testing.assert_close(other.steps.products()[1, 1], new.steps.products()[0, 0], rtol=1e-3, atol=0)


def test_a_run_that_loads_what_was_saved_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def train(steps: OptimizerSteps, run: Run, seed: int) -> None:
        for block in range(2):
            run.train(seed + block, 3)
            steps.end_block()

    run, other = (Run(windows=(4,), folder=tmp_path / "kept") for _ in range(2))
    run.steps.keep(0)
    run.steps.multiple = 2.0
    train(run.steps, run, 1)
    run.steps.keep(6)
    run.steps.save(tmp_path)
    with torch.no_grad():
        other.model.weight.copy_(run.weight)
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.steps.load(tmp_path)
    assert other.steps.multiple == 2.0
    for one in (run, other):
        train(one.steps, one, 7)
    assert torch.equal(run.steps.products(), other.steps.products())
    for act in (lambda steps: steps.apply_mean(4), lambda steps: steps.undo(6), lambda steps: steps.undo(0)):
        act(run.steps)
        act(other.steps)
        assert torch.equal(run.weight, other.weight)


def test_a_file_that_is_missing_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with raises_kind("checkpoint-no-history", "next-core.safetensors"):
        Run().steps.load(tmp_path)
    Run().steps.save(tmp_path)
    with raises_kind("checkpoint-no-history", "mean/4"):
        Run(windows=(4,)).steps.load(tmp_path)
    part = Run(rows=1)  # of the matrix, as each of six processes holds it
    part.steps.keep(0)
    part.steps.save(tmp_path)
    live = LiveModel(part.model)
    live.save_kept(live.keep(), tmp_path)
    with raises_kind("checkpoint-no-history", "5 weights, not 30"):
        Run().steps.load(tmp_path)
    with raises_kind("checkpoint-no-history", "(1, 5)", "(6, 5)"):
        LiveModel(Run().model).restore_saved(tmp_path)
    file = tmp_path / "next-core.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with raises_kind("checkpoint-no-history"):
        Run().steps.load(tmp_path)
    with raises_kind("storage-failed", "next-core.safetensors"):
        Run().steps.save(tmp_path / "missing")


def test_steps_at_a_rate_of_zero_or_without_a_gradient_count_as_no_motion() -> None:
    run = Run(rate=0.0)
    run.train(0, 2)
    run.steps.end_block()
    run.optimizer.param_groups[0]["lr"] = 0.1
    before = run.weight
    for _ in range(5):
        run.step(torch.zeros(SHAPE))
    run.steps.end_block()
    assert not torch.equal(run.weight, before)  # Adam coasts
    assert not run.steps.products().any()


def test_the_sample_is_spread_over_tensors_by_their_size_and_estimates_cosines() -> None:
    places = sample_indices([100, 300, 10**6], 1000)
    assert [len(one) for one in places] == [1, 1, 1000]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 10**6, generator=generator)
    b = 0.6 * a + 0.8 * b
    errors = []
    for start in range(0, 900, 100):
        some = (places[2] + start * 997) % 10**6
        errors.append(float(torch.cosine_similarity(a[some], b[some], dim=0)) - 0.6)
    assert max(map(abs, errors)) < 4 / math.sqrt(1000)


def test_motions_after_a_return_hold_only_what_new_gradients_brought() -> None:
    run = Run(betas=(0.9, 0.0), eps=1e-12)
    for _ in range(20):
        run.step(torch.ones(SHAPE))
    run.steps.keep(20)
    run.steps.undo(20)
    for sign in (-1, -1, -1):
        run.step(sign * torch.ones(SHAPE))
    run.steps.end_block()
    for sign in (-1, -1):
        run.step(sign * torch.ones(SHAPE))
    run.steps.end_block()
    products = run.steps.products()
    torch.testing.assert_close(products[0, 0], products[1, 1], rtol=1e-3, atol=0)  # the first of three told nothing
    assert products[0, 1] > 0


class Wrapper(torch.optim.Optimizer):
    """Calls the ``step`` of the optimizer it wraps, and not torch's constructor: its hooks are never called."""

    def __init__(self, params: Any, lr: float) -> None:
        self.param_groups = [{"params": list(params), "lr": lr}]

    def step(self, closure: Any = None) -> None: ...


class ScheduleFree(torch.optim.SGD):
    """Has the mode of schedule-free optimizers in which the weights are those that training returns."""

    def eval(self) -> None: ...


class Adam(torch.optim.AdamW):
    """Calls the ``step`` of its class within its own: torch calls the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["lr"] > 1e3:
            raise KeyboardInterrupt
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Counts its steps in the parameter group and divides by them; may keep a list in its state."""

    kept: Any = 0.0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter] = {"kept": self.kept}
                parameter.data -= group["lr"] * parameter.grad / group["step"]


@pytest.mark.parametrize("kind", [Wrapper, ScheduleFree, Adafactor, torch.optim.Rprop])
def test_an_optimizer_whose_steps_do_not_follow_its_rate_is_refused(tmp_path: Path, kind: Any) -> None:
    model = nn.Linear(2, 2)
    with raises_kind("backend-unsupported", kind.__name__, "adaptive-secant"):
        OptimizerSteps(WholeWeights(model, kind(model.parameters(), lr=None if kind is Adafactor else 0.1)), tmp_path)


def test_weights_that_begin_to_train_later_or_are_not_the_models_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = OptimizerSteps(WholeWeights(model, optimizer), tmp_path)
    steps.keep(0)
    model.bias.requires_grad = True
    with raises_kind("backend-unsupported", "SGD"):
        steps.keep(10)
    with raises_kind("backend-unsupported", "SGD"):  # as layer-wise optimizers of transformers do
        OptimizerSteps(WholeWeights(nn.Linear(2, 2), optimizer), tmp_path).keep(0)


def test_a_step_within_a_step_is_multiplied_once_and_an_error_leaves_no_rate_multiplied(tmp_path: Path) -> None:
    run, plain = Run(kind=Adam), Run()
    run.steps.multiple = 3.0
    for one in (run, plain):
        one.step(torch.ones(SHAPE))
    torch.testing.assert_close(run.weight, 3 * plain.weight)
    run.steps.multiple = 1e9
    with pytest.raises(KeyboardInterrupt):
        run.step(torch.ones(SHAPE))
    steps = OptimizerSteps(WholeWeights(run.model, run.optimizer), tmp_path)  # of the next training
    before, steps.multiple = run.weight, 2.0
    run.step(torch.ones(SHAPE))
    assert run.optimizer.param_groups[0]["lr"] == 0.1
    assert float((run.weight - before).abs().max()) == pytest.approx(0.2, rel=0.01)


def test_a_state_that_no_rollback_could_restore_is_refused_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "kept", [torch.zeros(1)])
    with raises_kind("backend-unsupported", "Counting", "'kept'", "list"):
        Run(kind=Counting).step(torch.ones(SHAPE))


@pytest.mark.parametrize("kind", [Adafactor, Counting])
def test_undo_restores_a_step_that_is_counted_as_a_number(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 8), torch.randn(64, 8)
    settings = {"relative_step": False, "scale_parameter": False} if kind is Adafactor else {}
    optimizer = kind(model.parameters(), lr=0.01, **settings)
    steps = OptimizerSteps(WholeWeights(model, optimizer), tmp_path / "kept")

    def train(count: int) -> Tensor:
        for _ in range(count):
            optimizer.zero_grad()
            (model(inputs) - 1.0).square().mean().backward()
            optimizer.step()
            steps.after_step()
        return model.weight.detach().clone()

    train(10)
    steps.keep(10)
    after = train(1)
    train(20)
    steps.save(tmp_path)
    steps.undo(10)
    assert torch.equal(train(1), after)
    resumed = OptimizerSteps(WholeWeights(model, optimizer), tmp_path / "kept")
    steps.close()
    resumed.load(tmp_path)
    resumed.undo(10)
    assert torch.equal(train(1), after)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_fp16_skips_counts_as_none_whoever_skips_it(tmp_path: Path, fused: bool) -> None:
    model, seen = nn.Linear(8, 8), dict[bool, Tensor]()
    for overflow in (False, True):
        torch.manual_seed(0)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        steps = OptimizerSteps(WholeWeights(model, optimizer), tmp_path)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4 if overflow else 3):
            optimizer.zero_grad()
            scaler.scale((model(torch.ones(1, 8)) - 1.0).square().mean()).backward()
            if overflow and step == 2:
                model.weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            steps.after_step()
        steps.end_block()
        seen[overflow] = steps.products()
        steps.close()
    assert torch.allclose(seen[True], seen[False], rtol=1e-3)
