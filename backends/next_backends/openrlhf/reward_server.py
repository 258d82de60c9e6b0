"""The run config's own reward, served to OpenRLHF over HTTP: one reward, whichever trainer asks."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from next_core.errors import BackendError, ConfigError, describe
from next_core.rewards import RewardFunction

AT_ONCE = 256
"""Requests that are answered by one call of the reward."""
CUT = 20
"""Characters of a prompt that have to be found in a query whose prompt was cut from the left."""


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
        while waiting := self._waiting(max(0.0, end - time.monotonic())):
            try:
                rewards = iter(self._rewarded([request for request, _ in waiting]))
                for request, answer in waiting:
                    mine = [next(rewards) for _ in request["query"]]
                    one = mine[0] if len(mine) == 1 else mine  # OpenRLHF asks for one at a time and wants a number
                    answer.set_result({"rewards": one, "scores": one, "extra_logs": {}})
            except Exception as error:
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_exception(error)
                raise BackendError(f"the reward failed: {describe(error)}") from error

    def close(self) -> None:
        """Turn away who still waits."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        while not self._asked.empty():
            self._asked.get()[1].set_exception(ConnectionError("the run is over"))

    def _waiting(self, seconds: float) -> list[tuple[dict[str, Any], Future[Any]]]:
        """What is asked within some seconds: the first, and all that is there by then."""
        found: list[tuple[dict[str, Any], Future[Any]]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._asked.get(timeout=seconds))
            while len(found) < AT_ONCE:
                found.append(self._asked.get_nowait())
        return found

    def _rewarded(self, requests: list[dict[str, Any]]) -> list[float]:
        """The rewards of all that was asked, in order."""
        asked = [
            (prompt, self._completion(query, prompt), label)
            for request in requests
            for query, prompt, label in zip(request["query"], request["prompts"], request["labels"], strict=True)
        ]
        prompts, completions, labels = ([row[part] for row in asked] for part in range(3))
        rewards = [float(reward) for reward in self._reward(prompts=prompts, completions=completions, answer=labels)]
        if len(rewards) != len(asked):
            raise ValueError(f"{len(rewards)} rewards for {len(asked)} completions")
        return rewards

    def _completion(self, query: str, prompt: str) -> str:
        text = query[_end_of(prompt, query) :]
        for token in self._special:
            text = text.replace(token, "")
        return text


def _end_of(prompt: str, query: str) -> int:
    """Where the prompt ends in a query, whose own may be cut from the left, or have a token before it.

    Raises ``ValueError`` where it is not found.
    """
    at = query.find(prompt)
    if at >= 0:
        return at + len(prompt)
    for kept in range(len(prompt) - 1, CUT - 1, -1):
        if query.startswith(prompt[-kept:]):
            return kept
    raise ValueError(
        f"the tokenizer does not give back the prompt {prompt[:60]!r}: it made {query[:60]!r} of it; name a file that "
        "reads such queries in backend.reward_file"
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 4096
    """A step's roll-outs all call at once; those that find no room are made to wait for seconds."""


def special_tokens(model: Path) -> list[str]:
    """The texts of a tokenizer's special tokens, longest first. Raises ``ConfigError`` for a file that is damaged."""
    found: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        path = model / name
        if not path.exists():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            named = [value for key, value in config.items() if key.endswith("_token")]
            named += config.get("additional_special_tokens") or []
            added = config.get("added_tokens_decoder") or {}
            listed = [*added.values(), *(config.get("added_tokens") or [])]
            named += [token for token in listed if token.get("special")]
            found |= {value["content"] if isinstance(value, dict) else value for value in named}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no tokenizer's ({describe(error)}); restore it") from None
    texts = [text for text in found if isinstance(text, str) and text]  # add_bos_token is yes or no
    return sorted(texts, key=len, reverse=True)


def _handler(asked: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer: Future[Any] = Future()
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not all(isinstance(request[key], list) for key in ("query", "prompts", "labels")):
                    raise ValueError("query, prompts and labels are lists")  # noqa: TRY301
                asked.put((request, answer))
                body = json.dumps(answer.result()).encode()
                self.send_response(200)
            except Exception as error:
                body = json.dumps({"error": describe(error)}).encode()
                self.send_response(500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # a client that has given up
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on the console."""

    return Handler
