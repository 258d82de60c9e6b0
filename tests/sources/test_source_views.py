"""A run as it stood at a step shows nothing later; a random walk takes the run's steps with random signs."""

import pickle

import pytest
import torch

from next_core import History, open_checkpoints
from next_core.mathematics.low_rank import dense
from next_core.sources.memory import MemorySource
from next_core.sources.source_views import RandomWalk, UpTo
from tests.conftest import LoraRun
from tests.diagnostics.replayed import RUNS, walked
from tests.errors import raises_kind
from tests.predictors.trajectories import curve, curved_lora_run, dense_run
from tests.sources.test_jumps import NAME, jump, moved


@pytest.mark.parametrize("walk", [False, True])
def test_a_run_up_to_a_step_shows_nothing_later(walk: bool) -> None:
    metrics = {step: {"reward": step / 100} for step in range(5, 105, 5)}
    run = MemorySource(curved_lora_run()._checkpoints, metrics=metrics)
    past = UpTo(RandomWalk(run, 0, 1) if walk else run, 50)
    assert past.steps == (0, 10, 20, 30, 40, 50)
    assert History(past).metrics("reward")[-1] == 0.5
    assert max(past.logged_metrics()) == 50
    for look in (
        lambda: past.delta("a", 60),
        lambda: past.delta("a", 50, 60),
        lambda: past.delta_rows("a", slice(0, 1), 60),
        lambda: past.factors("a", 60),
        lambda: past.metrics(60),
        lambda: past.fingerprint(60),
    ):
        with raises_kind("checkpoint-not-found", "step 60", "step 50"):
            look()


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())
def test_a_walk_is_the_run_with_its_increments_signed(make: object) -> None:
    source = make()
    walk, wanted = RandomWalk(source, 3, 1), walked(source, 3, 1)
    for step, since in ((80, None), (70, 20), (20, 70), (30, 30)):
        for name in ("a", "b"):
            delta = dense(wanted.delta(name, step, since))
            torch.testing.assert_close(dense(walk.delta(name, step, since)), delta)
            torch.testing.assert_close(walk.delta_rows(name, slice(2, 4), step, since), delta[2:4])


def test_the_signs_of_a_matrix_are_its_own_and_do_not_depend_on_the_others() -> None:
    paths = {"a": curve(1), "b": curve(40)}
    both, one = (dense_run(dict(list(paths.items())[:count]), range(10, 310, 10)) for count in (2, 1))
    signs = RandomWalk(both, 0, 1).signs("a")
    assert set(signs.values()) == {-1.0, 1.0}
    assert signs == RandomWalk(one, 0, 1).signs("a")
    for other in (
        RandomWalk(both, 0, 1).signs("b"),
        RandomWalk(one, 0, 2).signs("a"),
        RandomWalk(one, 1, 1).signs("a"),
    ):
        assert signs != other


def test_before_its_first_jump_a_run_began_with_nothing(own_lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    jump(own_lora_run, 2, 50, moved("t"))
    source = open_checkpoints(own_lora_run.path)
    assert source.start(NAME) is not None
    assert UpTo(source, 30).start(NAME) is None
    started = UpTo(source, 40).start(NAME)
    torch.testing.assert_close(started.B, moved("s")[f"{NAME}.lora_B"])


def test_another_process_sees_the_same(own_lora_run: LoraRun) -> None:
    jump(own_lora_run, 1, 30, moved("s"))
    walk = UpTo(RandomWalk(open_checkpoints(own_lora_run.path), 0, 1), 30)
    sent, here = (one.factors(NAME, 20) for one in (pickle.loads(pickle.dumps(walk)), walk))
    assert torch.equal(sent.B, here.B)
