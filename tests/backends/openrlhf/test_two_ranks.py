"""Our hooks in the real DeepSpeed on two ranks: what is written reaches masters, forward passes and engines."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.openrlhf

SCRIPT = Path(__file__).parent / "cpu" / "two_ranks.py"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_both_ranks_hold_what_was_written(
    stage: int, openrlhf_python: Path, openrlhf_env: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"PATH": os.defpath, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [str(openrlhf_python), str(SCRIPT), str(stage), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**openrlhf_env, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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
