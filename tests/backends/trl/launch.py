"""Two processes that make some runs of a script, for the tests of several processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


class Launch:
    """Starts ``script arguments...`` twice, waits, and keeps the exit ``codes`` and the end of the ``log``.

    Their output goes to ``out/name.*.log``.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        script: Path,
        arguments: Sequence[str],
        *,
        torchrun: bool = False,
        python: str | Path = sys.executable,
        more: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",  # the folder of a script here has one called vllm, which is not the package
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(out / "cache"),
            **(more or {}),
        }
        line = [str(python), "-W", "ignore"]
        if torchrun:
            starts = [([*line, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], {})]
        else:
            meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            starts = [(line, meeting | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        logs = [out / f"{name}.{number}.log" for number in range(len(starts))]
        processes = []
        for (begin, where), log in zip(starts, logs, strict=True):
            command = [*begin, str(script), *arguments]
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=environment | where, cwd=out, stdout=file, stderr=file))
        try:
            self.codes = [process.wait(timeout=timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            self.log = "\n".join(log.read_text()[-4000:] for log in logs)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
