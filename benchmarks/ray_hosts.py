"""`executor: ray` on several hosts: network namespaces of this machine, one Ray cluster across them, shared files.

    sudo python benchmarks/ray_hosts.py    # writes benchmarks/results/ray_hosts.json and prints the table

The job is to compress the deltas of the 1.5B shapes. Each host has an address, a Ray node and one CPU of its own; the
driver's host computes nothing. Every way must give the bytes of this process, also when a host dies midway. Needs root
and iproute2.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tables  # noqa: E402 - found by the line above, as is benchmarks.speed

RESULTS = tables.RESULTS / "ray_hosts.json"
BRIDGE, NETWORK, PORT = "next-core-br", "10.77.0", 6399
WORKERS = (1, 2, 4)
ENVIRONMENT = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "OMP_NUM_THREADS": "1",
}


def sh(*command: Any, check: bool = True) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
    return done.stdout


def inside(host: int) -> list[str]:
    """Return the words that run a command on a host."""
    return ["ip", "netns", "exec", f"next-core-{host}"]


def pids(host: int) -> list[int]:
    return [int(pid) for pid in sh("ip", "netns", "pids", f"next-core-{host}", check=False).split()]


def cpu_seconds(hosts: int) -> float:
    """Return the CPU-seconds of all processes on the hosts that compute."""
    total = 0
    for pid in (pid for host in range(1, hosts + 1) for pid in pids(host)):
        with contextlib.suppress(FileNotFoundError):
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def cluster(hosts: int) -> Iterator[str]:
    """Yield the address of a Ray cluster: host 0 leads and has no CPU, each other host has one."""
    os.environ |= ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "predictors")))
    }
    ray, address = Path(sys.executable).with_name("ray"), f"{NETWORK}.1:{PORT}"
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "link", "set", BRIDGE, "up")
        for host in range(hosts + 1):
            name, wire = f"next-core-{host}", f"nc-{host}"
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "link", "set", wire, "master", BRIDGE, "up")
            sh(*inside(host), "ip", "link", "set", "lo", "up")
            sh(*inside(host), "ip", "address", "add", f"{NETWORK}.{host + 1}/24", "dev", "eth0")
            sh(*inside(host), "ip", "link", "set", "eth0", "up")
        for host in range(hosts + 1):
            where = ["--address", address] if host else ["--head", f"--port={PORT}", "--include-dashboard=false"]
            common = [f"--node-ip-address={NETWORK}.{host + 1}", "--object-store-memory=100000000"]
            sh(*inside(host), ray, "start", *where, f"--num-cpus={1 if host else 0}", *common)
        yield address
    finally:
        for host in range(hosts + 1):
            for pid in pids(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            sh("ip", "link", "delete", f"nc-{host}", check=False)
            sh("ip", "netns", "delete", f"next-core-{host}", check=False)
        sh("ip", "link", "delete", BRIDGE, check=False)


def compress(checkpoints: Path, address: str | None, workers: int) -> Iterator[str]:
    """Compress the deltas of every matrix in turn; yield the digest of each one's components."""
    from next_core import open_checkpoints
    from next_core.compressors.exact import ExactCompressor
    from next_core.history.executor import Executor
    from next_core.history.matrix_tasks import Compress

    source = open_checkpoints(checkpoints)
    spans = tuple((step, None) for step in source.steps) + tuple(zip(source.steps[1:], source.steps, strict=False))
    executor = Executor() if address is None else Executor(name="ray", workers=workers, address=address)
    names = [parameter.name for parameter in source.parameters]
    for factors in executor.map(Compress(source, ExactCompressor(), spans, 1, False), names):
        parts = b"".join(part.contiguous().numpy().tobytes() for part in (factors.U, factors.S, factors.V))
        yield hashlib.sha256(parts).hexdigest()


def on_cluster(checkpoints: Path, matrices: int, workers: int, kill_at: int | None = None) -> dict[str, Any]:
    """Compress on so many hosts. ``kill_at``: kill every process of the last host after so many matrices."""
    digests = list[str]()
    with cluster(workers) as address:
        drive = [*inside(0), sys.executable, __file__, "--drive", checkpoints, address, workers]
        start, cpu = time.perf_counter(), cpu_seconds(workers)
        driver = subprocess.Popen(
            list(map(str, drive)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert driver.stdin is not None
        assert driver.stdout is not None
        for line in driver.stdout:
            if not line.startswith("digest "):
                continue
            digests.append(line.split()[1])
            if len(digests) == kill_at:
                for pid in pids(workers):
                    os.kill(pid, 9)
            if len(digests) == matrices:  # while the workers still live, whose time is lost with them
                spent, seconds = cpu_seconds(workers) - cpu, time.perf_counter() - start
            driver.stdin.write("next\n")
        if driver.wait():
            raise SystemExit(f"the driver failed with {workers} hosts")
    row = {"workers": workers, "killed_at": kill_at, "seconds": round(seconds, 1)}
    return row | {"cpu_s": None if kill_at else round(spent, 1), "digests": digests}


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        for digest in compress(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])):
            print("digest", digest, flush=True)
            sys.stdin.readline()
        return
    from benchmarks.speed.synthetic import QWEN_15B, LoraRun
    from next_core.process.hardware import hardware

    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = LoraRun(QWEN_15B).write(Path(scratch) / "checkpoints")
        cpu, start = time.process_time(), time.perf_counter()
        here = list(compress(checkpoints, None, 1))
        local = {"seconds": round(time.perf_counter() - start, 2), "cpu_s": round(time.process_time() - cpu, 2)}
        runs = [on_cluster(checkpoints, len(here), workers) for workers in WORKERS]
        runs.append(on_cluster(checkpoints, len(here), 2, kill_at=len(here) // 3))
    for run in runs:
        if run.pop("digests") != here:
            raise SystemExit(f"other bytes than in one process: {run}")
    found = {"hardware": hardware(), "matrices": len(here), "local": local, "runs": runs}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    rows = [["this process", local["seconds"], local["cpu_s"]]]
    for run in runs:
        killed = f", one killed after {run['killed_at']} matrices" if run["killed_at"] else ""
        text = f"Ray, {run['workers']} host{'s' * (run['workers'] > 1)}{killed}"
        rows.append([text, run["seconds"], run["cpu_s"] or ""])
    print(tables.table(["where", "seconds", "CPU-s"], [[str(cell) for cell in row] for row in rows]))


if __name__ == "__main__":
    main()
