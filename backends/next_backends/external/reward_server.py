"""The run config's reward, served to trainers over HTTP."""

import contextlib
import json
import multiprocessing
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from next_core.errors import BackendError, CheckpointError, NextCoreError, describe, trainer_failed, trainer_lost
from next_core.rewards import RewardFunction, make_reward
from next_core.run_config import TrainingSettings

LARGEST = 64 * 2**20  # Bytes of a request
TICK = 0.05  # Seconds between looks at whether next-core has ended

CUT = 20  # Characters of a prompt that must be found in a query whose prompt was cut from the left


class RewardProcess:
    """A process of its own that serves the run config's reward: no request waits for the rest of next-core.

    Raises the error of a reward that cannot be made. The process ends with this one, even by SIGKILL.
    """

    def __init__(self, training: TrainingSettings) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        """Readable when the reward has failed; see ``check``."""
        # Not multiprocessing's own process, which would run the main module, perhaps a user's script, again.
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for this process
        )
        theirs.close()
        try:
            self.connection.send(training)
            self.url: str = self._receive()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise ``BackendError`` if the reward has failed, or the process ended."""
        if self.connection.poll():
            self._receive()

    def _receive(self) -> Any:
        try:
            received = self.connection.recv()
        except (EOFError, OSError):
            raise trainer_lost(
                f"the process that serves rewards has ended with status {self._process.wait()}; its output says why"
            ) from None
        if isinstance(received, NextCoreError):
            raise received
        return received

    def close(self) -> None:
        """End the process; pending requests get an error."""
        self.connection.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:  # in the middle of a reward
            self._process.kill()
            self._process.wait()


def main(descriptor: int) -> None:
    """Serve the reward of the training settings that come first, until the other end of the pipe is closed."""
    with contextlib.suppress(EOFError, ConnectionError), Connection(descriptor) as connection:  # next-core ended
        training: TrainingSettings = connection.recv()
        try:
            server = RewardServer(make_reward(training.reward), special_tokens(training.model))
        except NextCoreError as error:
            connection.send(error)
            return
        connection.send(server.url)
        while not connection.poll():
            try:
                server.serve(TICK)
            except BackendError as error:
                connection.send(error)
        server.close()


class RewardServer:
    """Receives requests in threads and answers them in ``serve``, as a reward may need the main thread.

    ``special`` are the texts of special tokens, which are removed from completions.
    """

    def __init__(self, reward: RewardFunction, special: list[str]) -> None:
        self._reward, self._special = reward, special
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The value of ``--reward.remote_url``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}{self._server.path}"

    def serve(self, seconds: float) -> None:
        """Answer the requests of the next seconds. Raises ``BackendError`` if the reward fails."""
        end = time.monotonic() + seconds
        while waiting := self._waiting(max(0.0, end - time.monotonic())):
            try:
                rewards = iter(self._score([request for request, _ in waiting]))
                for request, answer in waiting:
                    own = [next(rewards) for _ in request["query"]]
                    found = own[0] if len(own) == 1 else own  # OpenRLHF asks for one at a time and expects a number
                    answer.set_result({"rewards": found, "scores": found, "extra_logs": {}})
            except Exception as error:
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_exception(error)
                raise trainer_failed(f"the reward failed: {describe(error)}") from error

    def close(self) -> None:
        """Stop the server; pending requests get an error."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        while not self._server.requests.empty():
            self._server.requests.get()[1].set_exception(ConnectionError("the run is over"))

    def _waiting(self, seconds: float) -> list[tuple[dict[str, Any], Future[Any]]]:
        """Wait for a request, at most some seconds; return it with all others that are there by then."""
        found: list[tuple[dict[str, Any], Future[Any]]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._server.requests.get(timeout=seconds))
            while True:
                found.append(self._server.requests.get_nowait())
        return found

    def _score(self, requests: list[dict[str, Any]]) -> list[float]:
        """Return the rewards of all completions, in order."""
        rows = [
            (prompt, self._completion(query, prompt), label)
            for request in requests
            for query, prompt, label in zip(request["query"], request["prompts"], request["labels"], strict=True)
        ]
        prompts, completions, labels = ([row[part] for row in rows] for part in range(3))
        rewards = [float(reward) for reward in self._reward(prompts=prompts, completions=completions, answer=labels)]
        if len(rewards) != len(rows):
            raise ValueError(f"{len(rewards)} rewards for {len(rows)} completions")
        return rewards

    def _completion(self, query: str, prompt: str) -> str:
        text = query[_prompt_end(prompt, query) :]
        for token in self._special:
            text = text.replace(token, "")
        return text


def _prompt_end(prompt: str, query: str) -> int:
    """Return where the prompt ends in a query, which may begin with a token or have its prompt cut from the left.

    Raises ``ValueError`` if the prompt is not found.
    """
    at = query.find(prompt)
    if at >= 0:
        return at + len(prompt)
    for kept in range(len(prompt) - 1, CUT - 1, -1):
        if query.startswith(prompt[-kept:]):
            return kept
    raise ValueError(
        f"the tokenizer turned the prompt {prompt[:60]!r} into {query[:60]!r}; name a file that reads such queries in "
        "backend.reward_file"
    )


def special_tokens(model: Path) -> list[str]:
    """Return the special tokens of a tokenizer, longest first. Raises ``CheckpointError`` for a damaged file."""
    found: set[str] = set()
    for path in (model / "tokenizer.json", model / "tokenizer_config.json"):
        if path.exists():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))  # with numbers as large as 10**30
                added = [*config.get("added_tokens", ()), *config.get("added_tokens_decoder", {}).values()]
                found |= {token["content"] for token in added if token.get("special")}
                named = [value for key, value in config.items() if key.endswith("_token")]
                found |= {value for value in named if isinstance(value, str)}  # add_bos_token is true or false
                found |= {value["content"] for value in named if isinstance(value, dict)}
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is not a tokenizer's ({describe(error)}); restore it", kind="checkpoint-damaged"
                ) from None
    return sorted(filter(None, found), key=len, reverse=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 4096  # All rollouts of a step call at once; a call that finds the queue full waits for seconds

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.requests: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]] = queue.SimpleQueue()
        self.path = f"/reward/{secrets.token_urlsafe()}"
        """Whoever does not know it gets no reward: other users of the machine can reach the port, too."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        answer: Future[Any] = Future()
        try:
            if not secrets.compare_digest(self.path, self.server.path):
                return self._answer(404, {"error": "no such page"})
            if not 0 <= (length := int(self.headers["Content-Length"])) <= LARGEST:
                return self._answer(413, {"error": f"a request has at most {LARGEST} bytes"})
            request = json.loads(self.rfile.read(length))
            if not all(isinstance(request[key], list) for key in ("query", "prompts", "labels")):
                raise ValueError("query, prompts and labels must be lists")  # noqa: TRY301
            self.server.requests.put((request, answer))
            self._answer(200, answer.result())
        except Exception as error:
            self._answer(500, {"error": describe(error)})

    def _answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        with contextlib.suppress(OSError):  # a client that has given up
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
