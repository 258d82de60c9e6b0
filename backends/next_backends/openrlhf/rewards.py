"""The run config's own reward, served to OpenRLHF over HTTP: one reward, whichever trainer asks."""

from __future__ import annotations

import json
import queue
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from next_core.errors import BackendError
from next_core.plugins import describe
from next_core.rewards import RewardFunction


class RewardServer:
    """Takes OpenRLHF's requests in threads, and answers them in ``serve``: a reward may need the main thread's alarms.

    ``special`` are the tokens' texts that are taken out of completions.
    """

    def __init__(self, reward: RewardFunction, special: list[str]) -> None:
        self._reward, self._special = reward, special
        self._asked: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]] = queue.SimpleQueue()
        self._server = _Server(("127.0.0.1", 0), _handler(self._asked))
        self._thread = threading.Thread(target=self._server.serve_forever, name="next-core-reward", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """For ``--reward.remote_url``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/reward"

    def serve(self, seconds: float) -> None:
        """Answer what is asked in the next seconds. Raises ``BackendError`` when the reward fails."""
        end = time.monotonic() + seconds
        while True:
            try:
                request, answer = self._asked.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            try:
                answer.set_result(self._rewarded(request))
            except Exception as error:
                answer.set_exception(error)
                raise BackendError(f"the reward failed: {describe(error)}") from error

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _rewarded(self, request: dict[str, Any]) -> dict[str, Any]:
        prompts, labels = request["prompts"], request["labels"]
        completions = [self._completion(query, prompt) for query, prompt in zip(request["query"], prompts, strict=True)]
        rewards = [float(reward) for reward in self._reward(prompts=prompts, completions=completions, answer=labels)]
        one = rewards[0] if len(rewards) == 1 else rewards  # OpenRLHF asks for one at a time and wants a number
        return {"rewards": one, "scores": one, "extra_logs": {}}

    def _completion(self, query: str, prompt: str) -> str:
        text = query[len(prompt) :]
        for token in self._special:
            text = text.replace(token, "")
        return text


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 4096
    """A step's roll-outs all call at once; those that find no room are made to wait for seconds."""


def special_tokens(model: Path) -> list[str]:
    """The texts of a tokenizer's special tokens, longest first."""
    found: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        path = model / name
        if not path.exists():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, value in config.items():
            if key.endswith("_token"):
                found.add(value["content"] if isinstance(value, dict) else str(value or ""))
        added = config.get("added_tokens_decoder", {})
        for token in (*(added.values() if isinstance(added, dict) else added), *config.get("added_tokens", [])):
            if token.get("special"):
                found.add(token["content"])
    return sorted(found - {""}, key=len, reverse=True)


def _handler(asked: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer: Future[Any] = Future()
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.put((request, answer))
                body = json.dumps(answer.result()).encode()
                self.send_response(200)
            except Exception as error:
                body = json.dumps({"error": describe(error)}).encode()
                self.send_response(500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on the console."""

    return Handler
