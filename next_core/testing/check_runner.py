"""Run the checks of a plug-in one by one, or all at once with one error that lists every failure."""

import contextlib
import functools
import json
import random
import unittest
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from next_core.errors import ConfigError, describe
from next_core.settings import Settings

CheckedKind = Literal["predictor", "source", "applier", "backend"]
Check = Callable[[Any], None]
"""One promise of an interface, the first line of its docstring. It takes the plug-in or its case and raises
``CheckError`` on failure, or ``unittest.SkipTest``, which pytest knows, where there is nothing to test."""
_CHECKS: dict[str, dict[str, Check]] = {}


class CheckError(AssertionError):
    """A plug-in breaks a promise of its interface: what was expected, and what was seen."""

    def __init__(self, expected: str, seen: object) -> None:
        super().__init__(f"expected: {expected}\nseen: {seen}")


def checks_of(kind: CheckedKind) -> Mapping[str, Check]:
    """Return every check of one kind of plug-in by name, in the order in which they run."""
    return dict(_CHECKS[kind])


def checks_for(kind: CheckedKind, as_case: Callable[[Any], Any] = lambda case: case) -> Callable[[Check], Check]:
    """Return a decorator that adds a function of a case to the checks of one kind of plug-in.

    ``as_case`` turns what a caller passes to the check into the case, which has the plug-in as ``plugin``.
    """
    checks = _CHECKS[kind] = {}

    def add(function: Check) -> Check:
        check = functools.wraps(function)(lambda subject: function(as_case(subject)))
        checks[function.__name__] = check
        return check

    add(has_a_name_and_strict_settings)
    return add


def has_a_name_and_strict_settings(case: Any) -> None:
    """The class has a `name`; its settings are immutable, strict, and read back unchanged from a run's config.yaml."""
    cls, config = type(case.plugin), case.plugin.config
    name = getattr(cls, "name", None)
    good = isinstance(name, str) and bool(name) and not set(name) & set(" \t\n:")
    expect(good, "a class attribute `name`: text without spaces or ':'", repr(name))
    expect(isinstance(config, Settings) and isinstance(config, cls.config_class), "a Settings as config", repr(config))
    strict = Settings.model_config.items() <= config.model_config.items()
    expect(strict, f"a model_config with {Settings.model_config}", config.model_config)
    again = type(config).model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    expect(again == config, f"{config!r} after being written and read", repr(again))


def run_checks(kind: CheckedKind, name: str, subject: Any, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of one kind. Raises an ``ExceptionGroup`` of what failed; each error's note names the promise.

    Raises ``ConfigError`` for an expected failure that names no check. One that passes is a failure.
    """
    checks, expected = _CHECKS[kind], dict(expected_failures or {})
    unknown = sorted(set(expected) - set(checks))
    if unknown:
        message = f"expected failures: there is no check {', '.join(unknown)} of a {kind}; known: {', '.join(checks)}"
        raise ConfigError(message, kind="config-unknown-key")
    failed: list[Exception] = []
    for key, check in checks.items():
        error: Exception | None = None
        try:
            check(subject)
        except unittest.SkipTest:
            continue
        except Exception as caught:  # a third party's code may raise anything
            error = caught
        if key in expected:
            error = CheckError(f"a failure: {expected[key]}", "it passes") if error is None else None
        if error is not None:
            error.add_note(f"{key}: {(check.__doc__ or '').splitlines()[0]}")
            failed.append(error)
    if failed:
        raise ExceptionGroup(f"{kind} '{name}' breaks {len(failed)} promises", failed)


def expect(holds: bool, expected: str, seen: object) -> None:
    """Raise ``CheckError`` unless it holds."""
    if not holds:
        raise CheckError(expected, seen)


def expect_raises(error: type[Exception], call: Callable[[], object], what: str) -> None:
    """Raise ``CheckError`` unless ``call`` raises an ``error``."""
    seen = "no error"
    try:
        call()
    except error:
        return
    except Exception as caught:
        seen = describe(caught)
    raise CheckError(f"{what} raises {error.__name__}", seen)


def expect_equal(before: Mapping[Any, Any], after: Mapping[Any, Any], what: str) -> None:
    """Raise ``CheckError`` unless two mappings are equal, their tensors bit for bit."""
    changed = [key for key in [*before, *after] if not _same(before.get(key), after.get(key))]
    expect(not changed, what, f"{changed[:1]} differs")


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


@contextlib.contextmanager
def global_state_unchanged() -> Iterator[None]:
    """Raise ``CheckError`` where the block draws from, or seeds, a global random state, or changes torch's settings.

    They belong to the trainer: a plug-in that touches them changes the run.
    """
    before = _global_state()
    yield
    expect_equal(before, _global_state(), "global state is left unchanged")


def _global_state() -> dict[str, object]:
    return {
        "torch's random state": torch.random.get_rng_state(),
        "numpy's random state": [str(part) for part in np.random.get_state()],
        "Python's random state": random.getstate(),
        "torch's default dtype and gradient mode": (torch.get_default_dtype(), torch.is_grad_enabled()),
    }
