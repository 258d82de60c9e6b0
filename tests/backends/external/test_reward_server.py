"""The run config's reward over HTTP, asked as OpenRLHF asks."""

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from next_backends.external.reward_server import RewardProcess, RewardServer, special_tokens
from next_core.rewards import MathVerifyReward
from next_core.run_config import TrainingSettings
from tests.errors import raises_kind

Served = Callable[..., RewardServer]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [len(text) for text in completions]


@pytest.fixture
def served() -> Iterator[Served]:
    made: list[RewardServer] = []

    def start(reward: Any, special: list[str] | None = None) -> RewardServer:
        made.append(RewardServer(reward, special or []))
        return made[-1]

    yield start
    for server in made:
        server.close()


Serving = RewardServer | RewardProcess


def post(server: Serving, body: bytes) -> tuple[int, Any]:
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    try:
        connection.request("POST", url.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def ask(
    server: RewardServer | RewardProcess, queries: list[str], prompts: list[str], labels: list[Any] | None = None
) -> Any:
    asked = {"query": queries, "prompts": prompts, "labels": labels or [""] * len(queries)}
    return post(server, json.dumps(asked).encode())


def answered(server: RewardServer, *asking: Callable[[], Any], seconds: float = 60.0) -> list[Any]:
    """What each gets, served meanwhile in this thread."""
    with ThreadPoolExecutor(len(asking)) as clients:
        futures: list[Future[Any]] = [clients.submit(one) for one in asking]
        end = time.monotonic() + seconds
        try:
            while not all(future.done() for future in futures):
                assert time.monotonic() < end, "no answer"
                server.serve(0.01)
        except BaseException:
            server.close()
            raise
        return [future.result() for future in futures]


def reward_of(server: RewardServer, query: str, prompt: str, label: str = "") -> Any:
    ((_, found),) = answered(server, lambda: ask(server, [query], [prompt], [label]))
    return found["rewards"]


def test_one_completion_gets_a_number_and_several_a_list_in_their_order(served: Served) -> None:
    server = served(lengths)
    ((status, found),) = answered(server, lambda: ask(server, ["1+1=two"], ["1+1="]))
    assert (status, found) == (200, {"rewards": 3.0, "scores": 3.0, "extra_logs": {}})
    ((_, found),) = answered(server, lambda: ask(server, ["a=1", "b=22", "c="], ["a=", "b=", "c="]))
    assert found["rewards"] == found["scores"] == [1.0, 2.0, 0.0]


def test_the_reward_gets_prompts_answers_and_completions_without_special_tokens(served: Served) -> None:
    given: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float]:
        given.append(columns)
        return [1.0]

    prompt = "<|im_start|>1+1=<|im_end|>"
    reward_of(served(reward, ["<|im_end|>", "<eos>"]), f"{prompt}2<|im_end|><eos><eos>", prompt, "2")
    assert given == [{"prompts": [prompt], "completions": ["2"], "answer": ["2"]}]


LONG = "So tell me now, what is 7+7?"
CHAT = "<|user|>What is 7+7?<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        (f"{CHAT}It is 14.<|end|>", CHAT),
        ("tell me now, what is 7+7? 14<eos>", f"Long ago. {LONG}"),  # OpenRLHF cuts a long prompt, in the query alone
        ("<bos>7+7=14<eos>", "7+7="),
    ],
)
def test_completions_are_found_after_changed_prompts(served: Served, query: str, prompt: str) -> None:
    server = served(MathVerifyReward(), ["<|end|>", "<bos>", "<eos>"])
    assert reward_of(server, query, prompt, "14") == 1.0


def fails(**_: Any) -> list[float]:
    raise KeyError("level")


@pytest.mark.parametrize(
    ("reward", "queries", "names"),
    [
        (fails, ["1+1=2"], ["KeyError: 'level'"]),
        (lambda **_: None, ["1+1=2", "1+1=2"], []),
        (lambda **_: ["good", "bad"], ["1+1=2", "1+1=2"], ["ValueError"]),
        (lambda **_: [1.0], ["1+1=2", "1+1=2"], ["1 rewards for 2 completions"]),
        (lambda **_: [1.0, 2.0, 3.0], ["1+1=2", "1+1=2"], ["3 rewards for 2 completions"]),
        (lengths, ["something else"], ["'1+1='", "'something else'", "backend.reward_file"]),
    ],
)
def test_a_failed_reward_ends_the_run(served: Served, reward: Any, queries: list[str], names: list[str]) -> None:
    server = served(reward)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, server, queries, ["1+1="] * len(queries))
        try:
            with raises_kind("backend-failed", *names):
                server.serve(60.0)
        finally:
            status, answer = asked.result()
    assert status == 500
    assert all(name in answer["error"] for name in names)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"query": "x", "prompts": [], "labels": []}', b"{}"])
def test_a_malformed_request_is_refused_and_others_are_served(served: Served, body: bytes) -> None:
    server = served(lengths)
    (status, _), (_, found) = answered(server, lambda: post(server, body), lambda: ask(server, ["a=1"], ["a="]))
    assert status == 500
    assert found["rewards"] == 1.0


@pytest.mark.parametrize(
    ("path", "length", "wanted"), [("/reward", 2, 404), ("/reward/guess", 2, 404), (None, 2**40, 413), (None, -1, 413)]
)
def test_strange_or_large_requests_are_refused(served: Served, path: str | None, length: int, wanted: int) -> None:
    url = urlsplit(served(lengths).url)
    with contextlib.closing(http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)) as connection:
        connection.request("POST", path or url.path, headers={"Content-Length": str(length)})
        assert connection.getresponse().status == wanted


def test_pending_completions_are_scored_in_one_call(served: Served) -> None:
    """A whole step of rollouts may call at once."""
    calls: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return lengths(completions)

    server = served(reward)
    with ThreadPoolExecutor(128) as clients:
        asked = [clients.submit(ask, server, ["a=" + "x" * number], ["a="]) for number in range(128)]
        while server._server.requests.qsize() < 128:
            time.sleep(0.01)
        server.serve(0.1)
        assert [future.result()[1]["rewards"] for future in asked] == list(range(128))
    assert calls == [128]


def test_closing_answers_pending_requests_with_an_error() -> None:
    server = RewardServer(lengths, [])
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, server, ["a"], ["a"])
        while server._server.requests.empty():
            time.sleep(0.01)
        server.close()
        assert asked.result()[0] == 500


def training(tmp_path: Path, reward: str) -> TrainingSettings:
    return TrainingSettings.model_validate({"model": tmp_path, "data": {"train": tmp_path}, "reward": reward})


def test_a_process_serves_rewards_while_this_one_is_busy(tmp_path: Path) -> None:
    server = RewardProcess(training(tmp_path, f"{__name__}:lengths"))
    try:
        with ThreadPoolExecutor(64) as clients:
            asked = [clients.submit(ask, server, ["a=" + "x" * number], ["a="]) for number in range(64)]
            assert [future.result()[1]["rewards"] for future in asked] == list(range(64))
        server.check()
    finally:
        server.close()
    assert server._process.returncode is not None


def test_a_reward_that_fails_in_its_process_is_reported_here_and_others_are_served(tmp_path: Path) -> None:
    server = RewardProcess(training(tmp_path, f"{__name__}:lengths"))
    try:
        assert ask(server, ["something else"], ["1+1="])[0] == 500
        assert server.connection.poll(60.0)
        with raises_kind("backend-failed", "'something else'", "backend.reward_file"):
            server.check()
        assert ask(server, ["a=1"], ["a="])[1]["rewards"] == 1.0
        server._process.kill()
        server._process.wait()
        with raises_kind("backend-process-lost", "status -9"):
            server.check()
    finally:
        server.close()


def test_a_reward_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with raises_kind("plugin-unknown", "no-such-reward"):
        RewardProcess(training(tmp_path, "no-such-reward"))


def test_rewards_are_computed_in_the_main_thread_for_alarms(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify limits its time by an alarm."""
    import math_verify

    limits: list[int | None] = []

    def parse(text: str, parsing_timeout: int | None) -> list[str]:
        limits.append(parsing_timeout)
        return real(text, parsing_timeout=parsing_timeout)

    real = math_verify.parse
    monkeypatch.setattr(math_verify, "parse", parse)
    server = served(MathVerifyReward(MathVerifyReward.config_class(timeout=1)))
    assert reward_of(server, "q=$9^{9^{9^{9}}}$", "q=", "$9^{9^{9^{9}}}+1$") == 0.0
    assert reward_of(server, "q=$2^3$", "q=", "$2^3$") == 1.0
    assert set(limits) == {1}  # which is given in the main thread only


ADDED = [
    {"id": 0, "content": "<|end|>", "special": True},
    {"id": 1, "content": "<|endoftext|>", "special": True},
    {"id": 2, "content": "<think>", "special": False},
]
DECODER = {"7": {"content": "<s>", "special": True}, "8": {"content": "word", "special": False}}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer", {"version": "1.0", "added_tokens": ADDED, "model": {}}, ["<|endoftext|>", "<|end|>"]),
        (
            "tokenizer_config",
            {
                "added_tokens_decoder": DECODER,
                "eos_token": "</s>",
                "pad_token": None,
                "unk_token": {"content": "<unk>", "__type": "AddedToken"},
                "add_bos_token": True,
                "model_max_length": 10**30,
                "tokenizer_class": "LlamaTokenizer",
            },
            ["<unk>", "</s>", "<s>"],
        ),
        ("other", {}, []),
    ],
)
def test_special_tokens_are_found_longest_first(tmp_path: Path, name: str, content: Any, expected: list[str]) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = special_tokens(tmp_path)
    assert sorted(found) == sorted(expected)
    assert found == sorted(found, key=len, reverse=True)  # one may begin as another does


@pytest.mark.parametrize("content", ['{"added_tokens": [1]}', '{"added_tokens": [{"special": true}]}', "[]", "{"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with raises_kind("checkpoint-damaged", tmp_path / "tokenizer.json"):
        special_tokens(tmp_path)
