"""Named checks of a plug-in: run one by one, or all at once with one error that says everything."""

from __future__ import annotations

import difflib
import traceback
import unittest
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from next_core.errors import ConfigError, describe

CheckedKind = Literal["predictor", "source", "applier", "backend"]


class CheckError(AssertionError):
    """A promise of an interface that a plug-in does not keep: what was expected, and what was seen."""

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected: {expected}\nseen: {seen}")
        self.expected, self.seen = expected, seen


class DoesNotApply(unittest.SkipTest):
    """A check has nothing to look at in this plug-in. pytest and unittest count the test as skipped."""


class ContractError(AssertionError):
    """Some checks of a plug-in failed, or were expected to fail and did not.

    An ``AssertionError``, so that test runners count it as a failed test. ``failed`` has a ``CheckError`` (or whatever
    the plug-in raised) by the name of the check, ``expected`` the reasons of those that failed as expected, and
    ``passed_unexpectedly`` the names of those that did not.
    """

    def __init__(
        self,
        subject: str,
        count: int,
        failed: Mapping[str, Exception],
        expected: Mapping[str, str],
        passed_unexpectedly: Mapping[str, str],
        promises: Mapping[str, str],
    ) -> None:
        self.failed, self.expected, self.passed_unexpectedly = failed, expected, passed_unexpectedly
        lines = [f"{subject} fails {len(failed)} of {count} checks"]
        for name, error in failed.items():
            wanted, seen = _seen(error)
            lines += [f"- {name}: {promises[name]}", f"    expected: {wanted}", f"    seen: {seen}"]
        if passed_unexpectedly:
            lines.append("expected to fail, and did not; take it out of the expected failures:")
            lines += [f"- {name}: {reason}" for name, reason in passed_unexpectedly.items()]
        if expected:
            lines.append("failed as expected:")
            lines += [f"- {name}: {reason}" for name, reason in expected.items()]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Check:
    """One promise of an interface. Call it with what it is about; it raises ``CheckError`` where it is not kept.

    An exception that the plug-in raises where it should not goes through as it is.
    """

    kind: CheckedKind
    name: str
    promise: str
    function: Callable[[Any], None]
    as_case: Callable[[Any], Any]

    def __call__(self, subject: Any) -> None:
        self.function(self.as_case(subject))


_CHECKS: dict[CheckedKind, dict[str, Check]] = {"predictor": {}, "source": {}, "applier": {}, "backend": {}}


def checks_of(kind: CheckedKind) -> Mapping[str, Check]:
    """Every check of one kind of plug-in, by name, in the order in which they run."""
    return dict(_CHECKS[kind])


def register(
    kind: CheckedKind, as_case: Callable[[Any], Any]
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a function of a case the check of its name; the first line of its docstring is the promise."""

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        promise = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        _CHECKS[kind][function.__name__] = Check(kind, function.__name__, promise, function, as_case)
        return function

    return decorate


def run_checks(
    kind: CheckedKind, subject: Any, case: Any, expected_failures: Mapping[str, str] | None, label: str
) -> None:
    """Run every check of one kind on a case. Raises ``ContractError``; ``ConfigError`` for what is expected wrongly.

    A check that does not apply counts as passed; one of those cannot be expected to fail either.
    """
    expected = validated(kind, expected_failures)
    failed: dict[str, Exception] = {}
    as_expected: dict[str, str] = {}
    passed: dict[str, str] = {}
    for name, check in _CHECKS[kind].items():
        error: Exception | None = None
        try:
            check.function(case)
        except DoesNotApply:
            pass
        except Exception as caught:  # anybody's code
            error = caught
        if name in expected:
            (passed if error is None else as_expected)[name] = expected[name]
        elif error is not None:
            failed[name] = error
    if failed or passed:
        promises = {name: check.promise for name, check in _CHECKS[kind].items()}
        raise ContractError(label, len(_CHECKS[kind]), failed, as_expected, passed, promises) from next(
            iter(failed.values()), None
        )


def validated(kind: CheckedKind, expected_failures: Mapping[str, str] | None) -> dict[str, str]:
    """The expected failures by check. Raises ``ConfigError`` for an unknown check, or one without a reason."""
    expected = dict(expected_failures or {})
    for name, reason in expected.items():
        if name not in _CHECKS[kind]:
            near = difflib.get_close_matches(name, _CHECKS[kind], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"expected failure '{name}': no check of a {kind} has this name{hint}")
        if not (isinstance(reason, str) and reason.strip()):
            raise ConfigError(f"expected failure '{name}' of a {kind} needs a reason, in words")
    return expected


def expect(holds: bool, expected: str, seen: object) -> None:
    """Raise ``CheckError`` unless it holds."""
    if not holds:
        raise CheckError(expected, str(seen))


def raises(error: type[Exception], call: Callable[[], object], what: str) -> Exception:
    """What ``call`` raises, which has to be an ``error``."""
    wanted = f"{what} raises {error.__name__}"
    try:
        answer = call()
    except error as caught:
        return caught
    except Exception as caught:
        raise CheckError(wanted, describe(caught)) from caught
    raise CheckError(wanted, f"no error; the answer was {_short(answer)}")


def _seen(error: Exception) -> tuple[str, str]:
    if isinstance(error, CheckError):
        return error.expected, error.seen
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return "no exception", f"{describe(error)}{where}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"a {type(value).__name__}"
