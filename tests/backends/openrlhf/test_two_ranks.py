"""Our hooks in the real DeepSpeed on two ranks: what is written reaches masters, forward passes and engines."""

import os
from pathlib import Path

import pytest

from next_backends.external.trainer_setup import shared_modules
from tests.backends.trl.launch import Launch

pytestmark = pytest.mark.openrlhf

SCRIPT = Path(__file__).parent / "cpu" / "two_ranks.py"
WAYS = [(1, "none"), (2, "none"), (2, "adam"), (2, "sleep"), (3, "none"), (3, "adam"), (3, "sleep")]


@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_both_ranks_hold_what_was_written(
    stage: int, offload: str, openrlhf_python: Path, openrlhf_env: dict[str, str], tmp_path: Path
) -> None:
    # The same compiler as the trainer finds: DeepSpeed would compile its extensions again for another one.
    programs = f"{openrlhf_python.parent}{os.pathsep}{os.environ['PATH']}"
    path = os.pathsep.join([openrlhf_env["PYTHONPATH"], shared_modules(tmp_path)])
    more = {**openrlhf_env, "PATH": programs, "PYTHONPATH": path}
    arguments = [str(stage), offload, str(tmp_path)]
    ranks = Launch(tmp_path, "rank", SCRIPT, arguments, python=openrlhf_python, more=more, timeout=1200)
    assert (ranks.codes, ranks.log.count("all is well")) == ([0, 0], 2), ranks.log
