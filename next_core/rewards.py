"""Verifiable rewards: by registered name, or any function that a config names."""

import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from next_core.errors import invalid_value
from next_core.interfaces import Reward
from next_core.plugins import import_object, make_chosen
from next_core.process.optional_packages import import_optional
from next_core.run_config import Choice
from next_core.settings import Settings

RewardFunction = Callable[..., list[float]]
OPERATORS = frozenset("+-*/^=")
BARE = re.compile(r"[\d\s.,()+\-*/^=]*")  # A completion that is one expression, not text that contains an answer


class MathVerifyConfig(Settings):
    evaluated: bool = Field(True, description="Reject an answer that is not worked out (9+5 for 14) or is an equation")
    correct: float = Field(1.0, description="Reward of a right answer")
    wrong: float = Field(0.0, description="Reward of any other")
    timeout: int = Field(5, ge=1, description="Seconds for one verification")


class MathVerifyReward(Reward):
    """1 where math-verify finds the completion equal to ``answer``, else 0; verdicts and parsed texts are cached.

    math-verify compares values, and 9+5 equals 14: without ``evaluated``, a policy learns to repeat the question.
    """

    name = "math-verify"
    config_class = MathVerifyConfig

    def __init__(self, config: MathVerifyConfig | None = None, /, **fields: Any) -> None:
        super().__init__(config, **fields)
        import_optional("math_verify", "trl")
        self._verify = functools.lru_cache(maxsize=100_000)(self._verify_once)
        self._parse = functools.lru_cache(maxsize=10_000)(self._parse_once)  # most of the time of a verdict

    def __call__(self, completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
        return [
            self.config.correct if self._verify(_text(completion), str(gold)) else self.config.wrong
            for completion, gold in zip(completions, answer, strict=True)
        ]

    def _verify_once(self, completion: str, answer: str) -> bool:
        from math_verify import verify

        text = completion.strip()
        evaluated = self.config.evaluated and not _operates(answer.strip())
        if evaluated and BARE.fullmatch(text) and _operates(text):
            return False
        gold, found = self._parse(answer), self._parse(text)
        if evaluated and found and _operates(str(found[-1])):  # found[-1] is the expression as written in a longer text
            return False
        return bool(gold and found and verify(gold, found, timeout_seconds=self._limit()))

    def _parse_once(self, text: str) -> list[Any]:
        from math_verify import parse

        found: list[Any] = parse(text, parsing_timeout=self._limit())
        return found

    def _limit(self) -> int | None:
        """Return the time limit: math-verify uses an alarm signal, which only the main thread can set."""
        return self.config.timeout if threading.current_thread() is threading.main_thread() else None


def _operates(text: str) -> bool:
    """Whether an expression still has an operator; a leading sign does not count."""
    return bool(OPERATORS & set(text[1:]))


def _text(completion: Any) -> str:
    """Return a completion as text: TRL passes strings, or for conversations a list of messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def make_reward(choice: Choice) -> RewardFunction:
    """Make a reward by name, ``module:Class`` or ``module:function``. Raises ``ConfigError`` for what is neither."""
    found = import_object(choice.name) if ":" in choice.name else None
    if found is None or (isinstance(found, type) and issubclass(found, Reward)):
        made: RewardFunction = make_chosen("reward", choice)
        return made
    if not callable(found):
        raise invalid_value(f"the reward '{choice.name}' is not a function")
    return functools.partial(found, **choice.fields) if choice.fields else found
