"""A base model and prompts by their names on the Hub: a server of ours first, then the cache without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from next_core.config import load_config
from next_core.planning import plan_run
from tests.crash import small_run

pytestmark = pytest.mark.trl
COMMIT = hashlib.sha1(b"commit").hexdigest()
BASE = small_run.EXAMPLES / "arithmetic" / "base"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a revision, the files of its tree, and each of them."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0].strip("/")
        kind, _, rest = path.partition("/")
        if "someone" not in path:
            self._answer(None)
        elif kind == "api":
            owner, name, what = rest.partition("/")[2].split("/")[:3]
            files = self.repos.get(f"{owner}/{name}")
            sizes = {at: {"oid": etag(data), "size": len(data)} for at, data in (files or {}).items()}
            tree = [{"type": "file", "path": at, **size} for at, size in sizes.items()]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}
            said = json.dumps(tree if what == "tree" else info).encode()
            self._answer(None if files is None else said, "application/json")
        else:
            owner, name, _, _, *file = path.removeprefix("datasets/").split("/")
            self._answer(self.repos[f"{owner}/{name}"].get("/".join(file)))

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, data: bytes | None, kind: str = "application/octet-stream") -> None:
        self.send_response(404 if data is None else 200)
        for key, value in (("ETag", f'"{etag(data or b"")}"'), ("X-Repo-Commit", COMMIT), ("Content-Type", kind)):
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    def log_message(self, *_: Any) -> None: ...


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a Hub with a model and a dataset whose columns have other names."""
    Hub.repos["someone/tiny"] = {path.name: path.read_bytes() for path in BASE.iterdir()} | {"pytorch_model.bin": b"no"}
    rows = (small_run.EXAMPLES / "arithmetic" / "train.jsonl").read_text().splitlines()[:64]
    asked = [{"question": row["prompt"], "answer": row["answer"]} for row in map(json.loads, rows)]
    Hub.repos["someone/sums"] = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in asked).encode()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


OFFLINE = """
import sys
from next_backends.data import read_rows
from next_core.config import load_config, with_model_folder
config = load_config(sys.argv[1])
print(with_model_folder(config).training.model, read_rows(config.training.data.train)[0])
"""


def test_a_run_downloads_its_model_and_prompts_once_and_then_needs_no_network(hub: str, tmp_path: Path) -> None:
    raw = small_run.raw_config(tmp_path / "data", steps=4, schedule={"settle": 0, "average": None}, guards={})
    raw |= {"measure_every": None, "save_every": None, "guards": {}}
    raw["training"]["model"] = f"someone/tiny@{COMMIT}"
    raw["training"]["data"] = {"train": {"name": "someone/sums@v1", "columns": {"prompt": "question"}}}
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(raw))

    def command(*arguments: Any, offline: bool) -> subprocess.CompletedProcess[str]:
        surroundings = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub}
        surroundings.pop("HF_HUB_OFFLINE", None)
        surroundings |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        line = [sys.executable, *map(str, arguments)]
        return subprocess.run(line, env=surroundings, capture_output=True, text=True)

    refused = command("-m", "next_core", "run", path, "--out", out, offline=True)
    assert refused.returncode == 2
    assert all(words in refused.stderr for words in ("someone/", "hf download", "[config-missing-file]"))
    done = command("-m", "next_core", "run", path, "--out", out, "--json", offline=False)
    assert done.returncode == 0, done.stderr
    assert [jump["accepted"] for jump in json.loads(done.stdout)["jumps"]] == [True]
    assert load_config(out / "config.yaml").training.model == Path(f"someone/tiny@{COMMIT}")
    assert "/api/datasets/someone/sums/revision/v1" in Hub.asked
    assert not any("telemetry" in path for path in Hub.asked)
    assert not list((tmp_path / "home").rglob("*.bin"))
    cached = command("-c", OFFLINE, path, offline=True)
    assert cached.returncode == 0, cached.stderr
    assert f"snapshots/{COMMIT}" in cached.stdout
    assert "'prompt': " in cached.stdout


def test_a_plan_downloads_nothing(tmp_path: Path) -> None:
    raw = small_run.raw_config(tmp_path / "data")
    raw["training"]["model"] = "someone/tiny"
    plan = plan_run(small_run.checked(raw), tmp_path / "run")
    assert "hf download someone/tiny" in plan["notes"][0]
