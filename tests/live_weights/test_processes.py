"""Two real processes over gloo: what process 0 calls runs in both, on the right object."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from next_core.live_weights.processes import Processes, everywhere
from tests.errors import raises_kind


class Counter:
    def __init__(self, processes: Processes) -> None:
        self.processes, self.count = processes, 0
        processes.register(self)

    @everywhere
    def add(self, amount: int, *, times: int = 1) -> int:
        self.count += amount * times
        return self.count


def two_objects_of_one_class(processes: Processes) -> None:
    first, second = Counter(processes), Counter(processes)
    processes.register(first)  # a second time, which changes nothing

    def act() -> int:
        return 100 * first.add(1, times=3) + second.add(2)

    assert processes.lead("in a test", act) == 302
    assert (first.count, second.count) == (3, 2)


def passes_that_differ(processes: Processes, fails: bool) -> None:
    """Process 1 makes one pass, and then fails or ends; process 0 makes two."""
    model = nn.Linear(1, 1)
    with processes.in_step([model]):
        model(torch.ones(1))
        if processes.leads:
            model(torch.ones(1))
        elif fails:
            raise ValueError("no such file")


def start(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    processes = Processes(rank, 2, timeout=20)
    two_objects_of_one_class(processes)
    with raises_kind("backend-processes-differ", "process"):
        passes_that_differ(processes, fails=False)
    theirs = raises_kind("backend-processes-differ", "process 1", "no such file")
    with theirs if rank == 0 else pytest.raises(ValueError, match="no such file"):
        passes_that_differ(processes, fails=True)
    processes.close()


def test_two_processes_act_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(start, (str(tmp_path / "meeting"),), nprocs=2)  # raises what a process raised
