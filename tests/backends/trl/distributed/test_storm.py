"""Sharded runs whose processes are killed at random, and started again until they end as a run that nobody killed."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.trl.distributed.cells import make_base
from tests.backends.trl.distributed.test_sharded import check_close, launch

pytestmark = pytest.mark.distributed
KILLS = 3


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_a_run_whose_processes_are_killed_at_random_ends_as_the_whole_run(mode: str, tmp_path: Path) -> None:
    whole, _ = ended(tmp_path / "whole", mode)
    stormy, starts = ended(tmp_path / "stormy", mode, random.Random(mode))
    assert starts > 1, "some process was killed"
    for mine, theirs in zip(stormy, whole, strict=True):
        at, wanted = mine["after"][24], theirs["after"][24]
        check_close({"logits": at["logits"]} | at["masters"], {"logits": wanted["logits"]} | wanted["masters"])
    jumps = [[record["step"] for record in seen[0]["journal"] if record["event"] == "jump"] for seen in (stormy, whole)]
    assert jumps[0] == jumps[1]


def ended(out: Path, mode: str, storm: random.Random | None = None) -> tuple[list[Any], int]:
    """Train to the end, with some kills at random moments; return what each process saw, and the number of starts."""
    (out / mode).mkdir(parents=True)
    make_base(out / "base")
    for start in range(1, 9):
        more = {}
        if storm is not None and start <= KILLS:
            more = {"STORM": f"{storm.randrange(2)} {storm.uniform(0, 3):.2f}"}
        log = launch(out, mode, ["storm"], **more).log
        files = [out / mode / f"storm.rank{rank}.pt" for rank in (0, 1)]
        seen = [torch.load(file, weights_only=False) for file in files if file.exists()]
        for file in files:
            file.unlink(missing_ok=True)
        if len(seen) == 2 and not any(one["error"] for one in seen):
            return seen, start
        assert more, log
    raise AssertionError("the run never ended")
