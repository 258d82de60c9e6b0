"""Real GRPO whose roll-outs vLLM generates on a CPU, in the trainer's process and on a server, with jumps in it."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.backends.external.real import python_of
from tests.backends.trl.launch import ROOT

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
SETTINGS = {
    "PYTHONPATH": os.pathsep.join(map(str, (HERE / "shim", ROOT, ROOT / "backends", ROOT / "predictors"))),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
AGREE = 0.02  # The largest difference of a token's log-probability between vLLM and the trainer
JUMP = 4
Seen = dict[str, Any]


@pytest.fixture(scope="module", params=["colocate", "server"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """``seen(run)``: what was seen of a run. All runs of a mode are made in one start of the trainer."""
    python, out = python_of("vllm"), tmp_path_factory.mktemp(request.param)
    command = [str(python), "-W", "ignore", str(HERE / "cells.py"), str(out), request.param]
    settings = os.environ | SETTINGS | {"XDG_CACHE_HOME": str(out / "cache")}
    with (out / "log").open("w") as log:
        process = subprocess.Popen(command, env=settings, cwd=out, stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the server

    def find(run: str) -> Seen:
        file = out / f"{run}.json"
        assert file.exists(), (out / "log").read_text()[-4000:]
        found: Seen = json.loads(file.read_text(encoding="utf-8"))
        return found

    return find


def decisions(seen: Seen, event: str) -> list[tuple[int, bool]]:
    return [(record["step"], record["accepted"]) for record in seen["journal"] if record["event"] == event]


def check_agreement(seen: Seen, steps: int, evaluations: Sequence[int] = ()) -> None:
    """Steps and evaluations generate with the weights that they begin with."""
    assert list(map(int, seen["sampling"])) == list(range(1, steps + 1))
    assert list(map(int, seen.get("eval_sampling", ()))) == list(evaluations)
    assert max(*seen["sampling"].values(), *seen.get("eval_sampling", {}).values()) < AGREE
    if seen["mode"] == "colocate":
        assert max(*seen["stale"].values(), *seen.get("stale_at_evaluation", {}).values()) < 1e-6


@pytest.mark.parametrize("cell", ["factors", "merged", "full"])
def test_the_roll_outs_after_a_jump_come_from_the_weights_it_led_to(seen: Any, cell: str) -> None:
    run = seen(cell)
    assert decisions(run, "jump") == [(JUMP, True)]
    check_agreement(run, 6)


def test_scaled_steps_reach_vllm(seen: Any) -> None:
    run = seen("scaled")
    assert len({record["multiple"] for record in run["journal"] if record["event"] == "scale"}) > 1
    assert decisions(run, "average") == [(16, True)]
    check_agreement(run, 16, [4, 8, 12, 16])


def test_an_evaluation_at_the_step_of_a_jump_or_rollback_generates_with_the_weights_after_it(seen: Any) -> None:
    run = seen("evaluated")
    assert decisions(run, "jump") + decisions(run, "verify") == [(JUMP, True), (JUMP + 4, False)]
    check_agreement(run, 10, [4, 8, 10])


def test_a_probe_that_generates_with_vllm_measures_the_weights_of_its_moment(seen: Any) -> None:
    run = seen("probed")
    assert decisions(run, "jump") == [(JUMP, True)]
    assert max(*run["eval_sampling"].values(), *run["sampling"].values()) < AGREE
    assert run.get("stale", {}).get("5", 0.0) < 1e-6
