"""Run the checks of a plug-in one by one, or all at once with one error that lists every failure."""

from __future__ import annotations

import contextlib
import difflib
import random
import traceback
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from next_core.errors import ConfigError, describe
from next_core.types import Plugin

if TYPE_CHECKING:
    import pytest

CheckedKind = Literal["predictor", "source", "applier", "backend"]
ExpectedFailures = Callable[[Any], Mapping[str, str]]


class CheckError(AssertionError):
    """A plug-in breaks a promise of its interface: what was expected, and what was seen."""

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected: {expected}\nseen: {seen}")
        self.expected, self.seen = expected, seen


class DoesNotApply(unittest.SkipTest):
    """A check has nothing to test in this plug-in. pytest and unittest report the test as skipped."""


class ContractError(AssertionError):
    """Some checks of a plug-in failed, or passed although they were expected to fail.

    It is an ``AssertionError``, so test runners report a failed test. ``failed`` maps the name of a check to its
    ``CheckError``, or to the exception that the plug-in raised. ``expected`` and ``passed_unexpectedly`` map the
    checks that were expected to fail to their reasons.
    """

    def __init__(
        self,
        subject: str,
        checks: Mapping[str, Check],
        failed: Mapping[str, Exception],
        expected: Mapping[str, str],
        passed_unexpectedly: Mapping[str, str],
    ) -> None:
        self.failed, self.expected, self.passed_unexpectedly = failed, expected, passed_unexpectedly
        lines = [f"{subject} fails {len(failed)} of {len(checks)} checks"]
        for name, error in failed.items():
            wanted, seen = _expected_and_seen(error)
            lines += [f"- {name}: {checks[name].promise}", f"    expected: {wanted}", f"    seen: {seen}"]
        for title, reasons in (
            ("passed, but were expected to fail; remove them from the expected failures:", passed_unexpectedly),
            ("failed as expected:", expected),
        ):
            if reasons:
                lines += [title, *(f"- {name}: {reason}" for name, reason in reasons.items())]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Check:
    """One promise of an interface. Call it with the plug-in or its case; it raises ``CheckError`` on failure.

    Exceptions raised by the plug-in itself are not caught.
    """

    kind: CheckedKind
    name: str
    promise: str
    function: Callable[[Any], None]
    as_case: Callable[[Any], Any]

    def __call__(self, subject: Any) -> None:
        self.function(self.as_case(subject))


class CheckSet:
    """The checks of one kind of plug-in, in the order in which they run.

    ``base`` is the interface; ``as_case`` turns what a caller passes (a plug-in or a case) into what checks receive.
    """

    def __init__(self, kind: CheckedKind, base: type[Plugin], as_case: Callable[[Any], Any]) -> None:
        self.kind, self.base, self.as_case = kind, base, as_case
        self.checks: dict[str, Check] = {}
        _SETS[kind] = self

    def add(self, function: Callable[[Any], None]) -> Callable[[Any], None]:
        """Register a function of a case as a check; the first line of its docstring is the promise it tests."""
        promise = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        self.checks[function.__name__] = Check(self.kind, function.__name__, promise, function, self.as_case)
        return function

    def run(self, subject: str, case: Any, expected_failures: Mapping[str, str] | None) -> None:
        """Run every check on a case. Raises ``ContractError``, and ``ConfigError`` for invalid expected failures.

        A check that does not apply counts as passed, also where it was expected to fail.
        """
        expected = self.validated(expected_failures)
        failed: dict[str, Exception] = {}
        as_expected: dict[str, str] = {}
        passed: dict[str, str] = {}
        for name, check in self.checks.items():
            error: Exception | None = None
            try:
                check.function(case)
            except DoesNotApply:
                pass
            except Exception as caught:  # a third party's code may raise anything
                error = caught
            if name in expected:
                (passed if error is None else as_expected)[name] = expected[name]
            elif error is not None:
                failed[name] = error
        if failed or passed:
            first = next(iter(failed.values()), None)
            raise ContractError(subject, self.checks, failed, as_expected, passed) from first

    def validated(self, expected_failures: Mapping[str, str] | None) -> dict[str, str]:
        """Return the expected failures. Raises ``ConfigError`` for an unknown check or a missing reason."""
        expected = dict(expected_failures or {})
        for name, reason in expected.items():
            if name not in self.checks:
                near = difflib.get_close_matches(name, self.checks, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                message = f"expected failure '{name}': there is no such check of a {self.kind}{hint}"
                raise ConfigError(message, kind="config-unknown-key")
            if not (isinstance(reason, str) and reason.strip()):
                message = f"expected failure '{name}' of a {self.kind}: give a reason as text"
                raise ConfigError(message, kind="config-invalid-value")
        return expected


_SETS: dict[CheckedKind, CheckSet] = {}


def checks_of(kind: CheckedKind) -> Mapping[str, Check]:
    """Return every check of one kind of plug-in by name, in the order in which they run."""
    return dict(_SETS[kind].checks)


def parametrize_with_checks(
    plugins: Sequence[type[Plugin] | Plugin], *, expected_failed_checks: ExpectedFailures | None = None
) -> pytest.MarkDecorator:
    """Give a test the arguments ``plugin`` and ``check``, once for each plug-in and each check of its kind.

    The test passes ``check`` what it takes: a predictor itself; a source that is open on some run; an ``ApplierCase``
    or a ``BackendCase``. The test id is ``name-check``; for an instance, the name includes its non-default settings.

    ``expected_failed_checks`` maps a plug-in to its expected failures, ``{check: reason}``. These become
    ``xfail(strict=True)``, so a check that passes anyway is reported as a failed test. Raises ``ConfigError`` for an
    unknown check, a missing reason, and anything that is not a plug-in of a checked kind.
    """
    import pytest

    arguments = []
    for plugin in plugins:
        checks = _set_of(plugin)
        expected = checks.validated(expected_failed_checks(plugin) if expected_failed_checks is not None else None)
        for name, check in checks.checks.items():
            marks = [pytest.mark.xfail(reason=expected[name], strict=True)] if name in expected else []
            arguments.append(pytest.param(plugin, check, marks=marks, id=f"{_label(plugin)}-{name}"))
    return pytest.mark.parametrize(("plugin", "check"), arguments)


def expect(holds: bool, expected: str, seen: object) -> None:
    """Raise ``CheckError`` unless it holds."""
    if not holds:
        raise CheckError(expected, str(seen))


def expect_text(value: object, what: str) -> None:
    """Raise ``CheckError`` unless a value is text with something in it."""
    expect(isinstance(value, str) and bool(value.strip()), f"{what} as non-empty text", repr(value))


def expect_raises(error: type[Exception], call: Callable[[], object], what: str) -> Exception:
    """Return what ``call`` raises; raise ``CheckError`` unless it is an ``error``."""
    wanted = f"{what} raises {error.__name__}"
    try:
        answer = call()
    except error as caught:
        return caught
    except Exception as caught:
        raise CheckError(wanted, describe(caught)) from caught
    text = repr(answer)
    raise CheckError(wanted, f"no error; it returned {text if len(text) < 120 else f'a {type(answer).__name__}'}")


def expect_progress(calls: Sequence[tuple[Any, ...]]) -> None:
    """Raise ``CheckError`` unless every recorded call was ``progress(text, done, total)`` with done in range."""
    for call in calls:
        good = len(call) == 3 and isinstance(call[0], str) and 0 <= call[1] <= call[2]
        expect(good, "progress(what, done, total) with text and 0 <= done <= total", call)


@contextlib.contextmanager
def global_state_unchanged() -> Iterator[None]:
    """Raise ``CheckError`` where the block draws from, or seeds, a global random state, or changes torch's settings.

    They belong to the trainer: a plug-in that touches them changes the run. torch's settings are restored afterwards.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.enable_grad():  # on at the start, whatever an earlier check left behind
        before = _global_state()
        try:
            yield
            changed = [what for what, value in _global_state().items() if value != before[what]]
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
    expect(not changed, "global state is left unchanged", f"changed: {', '.join(changed)}")


def _global_state() -> dict[str, object]:
    return {
        "torch's random state": torch.random.get_rng_state().tolist(),
        "numpy's random state": [str(part) for part in np.random.get_state()],
        "Python's random state": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
    }


def _set_of(plugin: object) -> CheckSet:
    cls = plugin if isinstance(plugin, type) else type(plugin)
    found = next((checks for checks in _SETS.values() if issubclass(cls, checks.base)), None)
    if found is None:
        wanted = ", ".join(_SETS)
        message = f"{plugin!r} has no checks; pass classes or instances of these kinds of plug-in: {wanted}"
        raise ConfigError(message, kind="config-invalid-value")
    return found


def _label(plugin: type[Plugin] | Plugin) -> str:
    if isinstance(plugin, type):
        return plugin.name
    fields = ",".join(f"{key}={value}" for key, value in plugin.config.model_dump(exclude_defaults=True).items())
    return f"{plugin.name}({fields})" if fields else plugin.name


def _expected_and_seen(error: Exception) -> tuple[str, str]:
    if isinstance(error, CheckError):
        return error.expected, error.seen
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return "no exception", f"{describe(error)}{where}"
