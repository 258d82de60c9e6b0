"""The map over matrices gives the same bytes wherever it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError

from next_core.errors import ConfigError, NextCoreError
from next_core.history.executor import Executor
from next_core.history.history import History
from tests.history.test_history import full_run, lora_run


def where(name: str) -> tuple[str, int, int]:
    return name, os.getpid(), torch.get_num_threads()


def fails(name: str) -> str:
    if name == "b":
        raise ConfigError("b cannot be done; leave it out")
    return name


@pytest.fixture
def pool() -> Executor:
    return Executor(name="local", workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Executor]:
    ray = pytest.importorskip("ray")
    executor = Executor(name="ray", workers=2)
    yield executor
    assert not ray.is_initialized()


def assert_same_bytes(executor: Executor) -> None:
    for run in (lora_run, full_run):
        here, there = History(run(), 2), History(run(), 2, executor=executor)
        here.compress("global", "local", "target", horizon=20)
        there.compress("global", "local", "target", horizon=20)
        for kind in ("global", "local", "target"):
            horizon = 20 if kind == "target" else None
            expected, found = here.components(kind, horizon), there.components(kind, horizon)  # type: ignore[arg-type]
            assert set(found) == set(expected) == {"a", "b", "c", "d"}
            for name in expected:
                for part in ("U", "S", "V", "energy"):
                    assert torch.equal(getattr(found[name], part), getattr(expected[name], part))
        for name, gram in there.grams().items():
            assert torch.equal(gram, here.grams()[name])


def test_one_worker_computes_in_this_process() -> None:
    assert [pid for _, pid, _ in Executor().map(where, ["a", "b"])] == [os.getpid()] * 2


def test_more_workers_are_processes_of_one_thread_and_answer_in_order(pool: Executor) -> None:
    answers = list(pool.map(where, ["c", "a", "b"]))
    assert [name for name, _, _ in answers] == ["c", "a", "b"]
    assert os.getpid() not in {pid for _, pid, _ in answers}
    assert {threads for _, _, threads in answers} == {1}


def test_a_pool_gives_the_same_bytes(pool: Executor) -> None:
    assert_same_bytes(pool)


def test_an_error_of_a_worker_is_the_users(pool: Executor) -> None:
    with pytest.raises(ConfigError, match="b cannot be done"):
        list(pool.map(fails, ["a", "b"]))


@pytest.mark.ray
def test_ray_gives_the_same_bytes(cluster: Executor) -> None:
    assert_same_bytes(cluster)


@pytest.mark.ray
def test_an_error_in_ray_is_the_users_and_ray_is_gone_after_it(cluster: Executor) -> None:
    with pytest.raises(ConfigError, match="b cannot be done"):
        list(cluster.map(fails, ["a", "b"]))


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install next-core\[ray\]"):
        list(Executor(name="ray").map(where, ["a"]))


def test_an_executor_is_named_in_a_config_by_its_bare_name_or_with_fields() -> None:
    assert Executor.model_validate("ray").name == "ray"
    assert Executor.model_validate({"name": "local", "workers": 3}).workers == 3
    for wrong in ("dask", {"name": "local", "workers": 0}, {"name": "local", "address": "auto"}, {"nodes": 2}):
        with pytest.raises(ValidationError):
            Executor.model_validate(wrong)


def test_in_this_process_too_a_matrix_is_computed_in_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert {threads for _, _, threads in Executor().map(where, ["a", "b"])} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def dies(name: str) -> str:
    os._exit(1)


def test_a_worker_that_dies_is_named_with_the_remedy(pool: Executor) -> None:
    with pytest.raises(NextCoreError, match="a worker died.*fewer workers"):
        list(pool.map(dies, ["a", "b"]))
