"""Our hooks in the real DeepSpeed on two ranks: what is written reaches masters, forward passes and engines."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from next_backends.external.trainer_setup import shared_modules

pytestmark = pytest.mark.openrlhf

SCRIPT = Path(__file__).parent / "cpu" / "two_ranks.py"


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "none"), (2, "none"), (2, "adam"), (2, "sleep"), (3, "none"), (3, "adam"), (3, "sleep")]
)
def test_both_ranks_hold_what_was_written(
    stage: int, offload: str, openrlhf_python: Path, openrlhf_env: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The same compiler as the trainer finds: DeepSpeed would compile its extensions again for another one.
    programs = f"{openrlhf_python.parent}{os.pathsep}{os.environ['PATH']}"
    shared = {"PATH": programs, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    path = os.pathsep.join([openrlhf_env["PYTHONPATH"], shared_modules(tmp_path)])
    command = [str(openrlhf_python), str(SCRIPT), str(stage), offload, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**openrlhf_env, **shared, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=1200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [text.rstrip().endswith("all is well") for text in said] == [True, True], "\n".join(said)
