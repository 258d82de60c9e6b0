"""TRL keeps the contract of backends on a tiny run.

OpenRLHF's tests are in ``tests/backends/openrlhf``.
"""

import pytest

from next_core import registry
from next_core.run_config import RunConfig
from next_core.testing import BackendCase, Check, checks_of
from tests.crash import small_run

ELSEWHERE = {
    "openrlhf": "a run takes minutes; tests/backends/openrlhf checks it with a simulated trainer",
    "verl": "a run takes minutes; tests/backends/verl checks it with a simulated trainer",
}
"""Backends that are not checked here, and why."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    schedule = {"observe": 2, "every": 1, "horizon": 1, "jump_every": 1, "settle": 0, "average": None}
    folder = tmp_path_factory.mktemp("data")
    return small_run.checked(
        small_run.raw_config(folder, steps=4, save_every=2, schedule=schedule, guards={"recovery": None})
    )


@pytest.fixture(scope="module")
def trl(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> BackendCase:
    return BackendCase(registry().make("backend", "trl"), run, tmp_path_factory.mktemp("trl"))


@pytest.mark.trl
@pytest.mark.parametrize("check", checks_of("backend").values(), ids=checks_of("backend"))
def test_trl_keeps_the_contract(check: Check, trl: BackendCase) -> None:
    check(trl)


def test_every_installed_backend_is_checked_or_listed_with_a_reason() -> None:
    assert set(registry().names("backend")) == {"trl", *ELSEWHERE}
