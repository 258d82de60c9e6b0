"""A reward is 1 for an answer that is right, and a sum to be worked out is not an answer."""

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from next_core.rewards import MathVerifyConfig, MathVerifyReward, make_reward
from next_core.run_config import Choice
from tests.errors import raises_kind


@pytest.fixture(scope="module")
def reward() -> MathVerifyReward:
    return MathVerifyReward()


RIGHT = [
    *[("14", "14"), (" 14\n", "14"), ("14.0", "14"), ("0.5", "1/2"), (r"\boxed{14}", "14"), (r"$\frac{1}{2}$", "1/2")],
    *[("-5", "-5"), ("The answer is -5", "-5"), ("The answer is $-5$.", "-5"), ("$x+1$", "$1+x$"), ("9+5", "9+5")],
    ("9+5=14, so the answer is 14", "14"),
    (r"We go step-by-step: $9+5=14$. The answer is \boxed{14}", "14"),
]
WRONG = [
    *[("15", "14"), ("", "14"), ("fourteen", "14"), ("5", "-5"), ("9+5", "14"), ("9 + 5", "14"), ("7*2", "14")],
    *[("28/2", "14"), ("9+5=14", "14"), ("-9+4", "-5"), ("4=46", "46"), (r"\boxed{9+5}", "14")],
    *[("The answer is $9+5$.", "14"), ("The answer is 9+5", "14"), (r"9+5=14, so \boxed{15}", "14")],
]
"""Another value, or a sum that is still to be worked out."""


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"), [(*pair, 1.0) for pair in RIGHT] + [(*pair, 0.0) for pair in WRONG]
)
def test_only_what_equals_the_answer_is_right(
    reward: MathVerifyReward, completion: str, answer: str, wanted: float
) -> None:
    assert reward([completion], [answer]) == [wanted]


def test_answers_may_be_numbers_and_completions_conversations(reward: MathVerifyReward) -> None:
    said = [{"role": "user", "content": "9+5?"}, {"role": "assistant", "content": "14"}]
    assert reward([said, "15", "3"], [14, 15, 2], prompt=["a", "b", "c"]) == [1.0, 1.0, 0.0]


def test_a_sum_counts_as_its_value_only_where_that_is_asked_for() -> None:
    lenient = MathVerifyReward(MathVerifyConfig(evaluated=False, correct=2.0, wrong=-1.0))
    assert lenient(["9+5", "9+4"], ["14", "14"]) == [2.0, -1.0]


def test_the_same_pair_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    calls: list[str] = []
    parse = math_verify.parse

    def counting(text: str, **options: Any) -> Any:
        calls.append(text)
        return parse(text, **options)

    monkeypatch.setattr(math_verify, "parse", counting)
    reward = MathVerifyReward()
    assert reward(["14", "14"], ["14", "14"]) == [1.0, 1.0]
    first = len(calls)
    assert first > 0
    assert reward(["14"], ["14"]) == [1.0]
    assert len(calls) == first
    reward(["14"], ["15"])
    assert len(calls) > first


def test_a_verdict_is_the_same_in_another_thread() -> None:
    found: list[float] = []
    worker = threading.Thread(target=lambda: found.extend(MathVerifyReward()(["14", "9+5"], ["14", "14"])))
    worker.start()
    worker.join()
    assert found == [1.0, 0.0]


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with raises_kind("config-missing-package", "math_verify", "next-core[trl]"):
        make_reward(Choice(name="math-verify"))


@pytest.fixture
def my_rewards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's own, with ``score``."""
    module = ModuleType("my_rewards")

    def score(completions: list[str], answer: list[str], bonus: float = 0.0, **columns: Any) -> list[float]:
        return [float(text == gold) + bonus for text, gold in zip(completions, answer, strict=True)]

    module.score, module.number = score, 5
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


def test_a_function_or_class_of_the_users_own_is_a_reward_with_settings(my_rewards: ModuleType) -> None:
    plain: Callable[..., list[float]] = make_reward(Choice(name="my_rewards:score"))
    assert plain(["a", "b"], answer=["a", "a"]) == [1.0, 0.0]
    with_fields = make_reward(Choice.model_validate({"name": "my_rewards:score", "bonus": 0.5}))
    assert with_fields(["a", "b"], answer=["a", "a"]) == [1.5, 0.5]
    my_rewards.Strict = type("Strict", (MathVerifyReward,), {"name": "strict"})
    reward = make_reward(Choice.model_validate({"name": "my_rewards:Strict", "wrong": -1.0}))
    assert reward(["14", "15"], answer=["14", "14"]) == [1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my_rewards:scroe", "'scroe'"),
        ("a_package_nobody_has:score", "PYTHONPATH"),
        (":score", "module:attribute"),
        ("my_rewards:", "module:attribute"),
        ("my_rewards:number", "not a function"),
    ],
)
def test_a_function_that_is_not_there_is_named_with_the_reason(my_rewards: ModuleType, name: str, reason: str) -> None:
    with raises_kind("config-invalid-value", f"'{name}'", reason):
        make_reward(Choice(name=name))
