"""The map over matrices: the same bytes in this process, in a pool and on Ray; errors and crashes reach the user."""

import os
import pickle
import sys
from collections.abc import Callable

import pytest
import torch

from next_core.compressors.exact import ExactCompressor
from next_core.errors import ConfigError
from next_core.history.executor import Executor
from next_core.history.matrix_tasks import Compress, InnerProducts
from next_core.sources.memory import MemorySource
from tests.errors import raises_kind
from tests.history.test_history import full_run, lora_run

POOL, RAY = Executor(name="local", workers=2), Executor(name="ray", workers=2)
SPANS = ((30, None), (50, 30))
NAMES = ["c", "a", "b"]


def where(name: str) -> tuple[str, int, int]:
    return name, os.getpid(), torch.get_num_threads()


def compress(name: str) -> tuple[torch.Tensor, tuple[str, int, int]]:
    if name == "bad":
        raise ConfigError("bad cannot be computed; leave it out", kind="config-invalid-value")
    return Compress(lora_run(), ExactCompressor(), SPANS, 2, False)(name).U, where(name)


def die(name: str) -> str:
    os._exit(1)


@pytest.mark.parametrize("run", [lora_run, full_run])
def test_tasks_give_the_same_bytes_in_another_process(run: Callable[[], MemorySource]) -> None:
    source = run()
    for task in (Compress(source, ExactCompressor(), SPANS, 2, False), InnerProducts(source, SPANS)):
        here, there = task("a"), pickle.loads(pickle.dumps(task))("a")
        for part in ("U", "S", "V", "energy") if isinstance(task, Compress) else ("data",):
            assert torch.equal(getattr(there, part), getattr(here, part))


@pytest.mark.parametrize("executor", [POOL, pytest.param(RAY, marks=pytest.mark.ray)], ids=["pool", "ray"])
def test_workers_give_the_same_bytes_in_order_and_their_errors_reach_the_user(executor: Executor) -> None:
    found = []
    with raises_kind("config-invalid-value", "bad"):
        for result in executor.map(compress, [*NAMES, "bad"]):
            found.append(result)  # noqa: PERF402 - the last one raises
    assert [said[0] for _, said in found] == NAMES
    assert os.getpid() not in {said[1] for _, said in found}
    assert {said[2] for _, said in found} == {1}, "threads"
    for (U, _), name in zip(found, NAMES, strict=True):
        assert torch.equal(U, compress(name)[0])
    if executor is RAY:
        assert not sys.modules["ray"].is_initialized()


def test_one_worker_computes_in_this_process_in_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(Executor().map(where, NAMES)) == [(name, os.getpid(), 1) for name in NAMES]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_worker_that_dies_is_an_error_of_ours() -> None:
    with raises_kind("executor-worker-died"):
        list(POOL.map(die, ["a", "b"]))


def test_a_missing_ray_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with raises_kind("config-missing-package", "pip install next-core[ray]"):
        list(RAY.map(where, ["a"]))
