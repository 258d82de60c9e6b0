"""The run config's reward over HTTP, asked as OpenRLHF asks."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from next_backends.openrlhf.reward_server import RewardServer, special_tokens
from next_core.errors import BackendError
from next_core.rewards import MathVerifyReward

Served = Callable[..., RewardServer]


TOLD = "So tell me now, what is 7+7?"


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


def post(server: RewardServer, body: bytes) -> tuple[int, Any]:
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    try:
        connection.request("POST", url.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def ask(server: RewardServer, queries: list[str], prompts: list[str], labels: list[Any] | None = None) -> Any:
    asked = {"query": queries, "prompts": prompts, "labels": labels or [""] * len(queries)}
    return post(server, json.dumps(asked).encode())


def answered(server: RewardServer, *asking: Callable[[], Any], seconds: float = 10.0) -> list[Any]:
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


def test_one_completion_gets_a_number(served: Served) -> None:
    server = served(lengths)
    ((status, found),) = answered(server, lambda: ask(server, ["1+1=two"], ["1+1="]))
    assert (status, found) == (200, {"rewards": 3.0, "scores": 3.0, "extra_logs": {}})


def test_several_completions_get_a_list_in_their_order(served: Served) -> None:
    server = served(lengths)
    ((_, found),) = answered(server, lambda: ask(server, ["a=1", "b=22", "c="], ["a=", "b=", "c="]))
    assert found["rewards"] == found["scores"] == [1.0, 2.0, 0.0]


def test_the_reward_is_told_prompts_answers_and_completions_without_special_tokens(served: Served) -> None:
    told: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float]:
        told.append(columns)
        return [1.0]

    server = served(reward, ["<|im_end|>", "<eos>"])
    query = "<|im_start|>1+1=<|im_end|>2<|im_end|><eos><eos>"
    answered(server, lambda: ask(server, [query], ["<|im_start|>1+1=<|im_end|>"], ["2"]))
    assert told == [{"prompts": ["<|im_start|>1+1=<|im_end|>"], "completions": ["2"], "answer": ["2"]}]


def test_a_rendered_conversation_is_cut_off_as_a_whole(served: Served) -> None:
    prompt = "<|user|>What is 7+7?<|end|><|assistant|>"
    server = served(MathVerifyReward(), ["<|end|>"])
    ((_, found),) = answered(server, lambda: ask(server, [f"{prompt}It is 14.<|end|>"], [prompt], ["14"]))
    assert found["rewards"] == 1.0


def test_a_reward_that_fails_ends_the_run_and_tells_the_client(served: Served) -> None:
    def reward(**_: Any) -> list[float]:
        raise KeyError("level")

    server = served(reward)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, server, ["1+1=2"], ["1+1="])
        with pytest.raises(BackendError, match="the reward failed: KeyError: 'level'"):
            server.serve(5.0)
        assert asked.result() == (500, {"error": "KeyError: 'level'"})


@pytest.mark.parametrize("rewards", [None, ["good", "bad"], [None, None]])
def test_a_reward_that_returns_no_numbers_ends_the_run(served: Served, rewards: Any) -> None:
    server = served(lambda **_: rewards)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, server, ["1+1=2", "1+1=2"], ["1+1=", "1+1="])
        try:
            with pytest.raises(BackendError, match="the reward failed"):
                server.serve(5.0)
        finally:
            status, _ = asked.result()
        assert status == 500


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_reward_that_returns_another_number_of_rewards_ends_the_run(served: Served, rewards: list[float]) -> None:
    server = served(lambda **_: rewards)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, server, ["1+1=2", "1+1=2"], ["1+1=", "1+1="])
        with pytest.raises(BackendError, match="the reward failed"):
            server.serve(0.5)
        assert asked.result()[0] == 500


def test_a_request_that_is_no_json_is_refused_and_others_are_served(served: Served) -> None:
    server = served(lengths)
    (status, _), (_, found) = answered(server, lambda: post(server, b"{"), lambda: ask(server, ["a=1"], ["a="]))
    assert status == 500
    assert found["rewards"] == 1.0


def test_a_whole_step_of_roll_outs_calls_at_once_and_nobody_waits(served: Served) -> None:
    server = served(lengths)
    together = threading.Barrier(256)

    def one(number: int) -> float:
        together.wait()
        begun = time.monotonic()
        _, found = ask(server, ["a=" + "x" * number], ["a="])
        assert found["rewards"] == number
        return time.monotonic() - begun

    waited = answered(server, *(lambda number=number: one(number) for number in range(256)))
    assert max(waited) < 2.0  # calls that find no room are tried again after one, three, seven seconds


def test_what_is_asked_at_once_is_rewarded_at_once(served: Served) -> None:
    calls: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return lengths(completions)

    server = served(reward)
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(ask, server, ["a=" + "x" * number], ["a="]) for number in range(8)]
        time.sleep(0.5)
        server.serve(0.1)
        assert [future.result()[1]["rewards"] for future in asked] == list(range(8))
    assert calls == [8]


def test_serving_ends_in_time_when_nobody_asks(served: Served) -> None:
    begun = time.monotonic()
    served(lengths).serve(0.1)
    assert 0.09 < time.monotonic() - begun < 1.0


def test_closing_turns_away_who_is_not_answered() -> None:
    server = RewardServer(lengths, [])
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    connection.request("POST", url.path, json.dumps({"query": ["a"], "prompts": ["a"], "labels": [""]}))
    time.sleep(0.1)
    begun = time.monotonic()
    server.close()
    assert connection.getresponse().status == 500
    assert time.monotonic() - begun < 2.0
    connection.close()


def test_an_answer_that_takes_too_long_to_verify_is_wrong(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify's limit is an alarm, which works in the main thread only: there it is served."""
    import math_verify

    where: list[bool] = []

    def parse(text: str, parsing_timeout: int | None) -> list[str]:
        where.append(threading.current_thread() is threading.main_thread())
        assert parsing_timeout == 1
        return real(text, parsing_timeout=parsing_timeout)

    real = math_verify.parse
    monkeypatch.setattr(math_verify, "parse", parse)
    server = served(MathVerifyReward(MathVerifyReward.config_class(timeout=1)))
    begun = time.monotonic()
    hard, easy = answered(
        server,
        lambda: ask(server, ["q=$9^{9^{9^{9}}}$"], ["q="], ["$9^{9^{9^{9}}}+1$"]),
        lambda: ask(server, ["q=$2^3$"], ["q="], ["$2^3$"]),
    )
    assert time.monotonic() - begun < 6.0
    assert (hard[1]["rewards"], easy[1]["rewards"]) == (0.0, 1.0)
    assert all(where)


def test_a_prompt_that_openrlhf_truncated_costs_no_completion(served: Served) -> None:
    """It generates from the last tokens of a prompt that is too long, and sends the whole prompt beside the query."""
    server = served(MathVerifyReward(), ["<eos>"])
    ((_, found),) = answered(
        server, lambda: ask(server, ["tell me now, what is 7+7? 14<eos>"], [f"Long ago. {TOLD}"], ["14"])
    )
    assert found["rewards"] == 1.0


def test_a_token_before_the_prompt_costs_no_completion(served: Served) -> None:
    server = served(MathVerifyReward(), ["<bos>", "<eos>"])
    ((_, found),) = answered(server, lambda: ask(server, ["<bos>7+7=14<eos>"], ["7+7="], ["14"]))
    assert found["rewards"] == 1.0


def test_a_query_without_its_prompt_ends_the_run(served: Served) -> None:
    server = served(lengths)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, server, ["something else"], ["7+7="])
        with pytest.raises(BackendError, match="does not give back the prompt '7\\+7=': .*backend.reward_file"):
            server.serve(5.0)
        assert asked.result()[0] == 500


def tokenizer(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_special_tokens_of_a_fast_tokenizer(tmp_path: Path) -> None:
    added = [
        {"id": 0, "content": "<|end|>", "special": True},
        {"id": 1, "content": "<|endoftext|>", "special": True},
        {"id": 2, "content": "<think>", "special": False},
    ]
    found = special_tokens(tokenizer(tmp_path, tokenizer={"version": "1.0", "added_tokens": added, "model": {}}))
    assert found == ["<|endoftext|>", "<|end|>"]  # the longest first: one may begin as another does


def test_special_tokens_of_a_tokenizers_config(tmp_path: Path) -> None:
    decoder = {"7": {"content": "<s>", "special": True}, "8": {"content": "word", "special": False}}
    config = {
        "added_tokens_decoder": decoder,
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": {"content": "<unk>", "__type": "AddedToken"},
        "tokenizer_class": "LlamaTokenizer",
    }
    assert sorted(special_tokens(tokenizer(tmp_path, tokenizer_config=config))) == ["</s>", "<s>", "<unk>"]


def test_special_tokens_of_a_map(tmp_path: Path) -> None:
    found = {"bos_token": {"content": "[CLS]", "lstrip": False}, "mask_token": "[MASK]"}
    assert special_tokens(tokenizer(tmp_path, special_tokens_map=found)) == ["[MASK]", "[CLS]"]


def test_a_model_without_a_tokenizer_has_no_special_tokens(tmp_path: Path) -> None:
    assert special_tokens(tmp_path) == []


def test_a_tokenizers_switches_are_no_tokens(tmp_path: Path) -> None:
    config = {"add_bos_token": True, "add_eos_token": False, "eos_token": "</s>"}
    assert special_tokens(tokenizer(tmp_path, tokenizer_config=config)) == ["</s>"]


def test_a_maps_further_special_tokens_count(tmp_path: Path) -> None:
    found = {"eos_token": "</s>", "additional_special_tokens": ["<|turn|>", {"content": "<|stop|>"}]}
    assert sorted(special_tokens(tokenizer(tmp_path, special_tokens_map=found))) == ["</s>", "<|stop|>", "<|turn|>"]
