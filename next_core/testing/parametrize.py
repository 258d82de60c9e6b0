"""One pytest test for each plug-in and check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from next_core.backend import Backend
from next_core.errors import ConfigError
from next_core.interfaces import CheckpointSource, WeightApplier
from next_core.predictor import TrajectoryPredictor
from next_core.testing.check_runner import CheckedKind, checks_of, validated
from next_core.types import Plugin

if TYPE_CHECKING:
    import pytest

_BASES: Mapping[CheckedKind, type[Plugin]] = {
    "predictor": TrajectoryPredictor,
    "source": CheckpointSource,
    "applier": WeightApplier,
    "backend": Backend,
}
ExpectedFailures = Callable[[Any], Mapping[str, str]]


def parametrize_with_checks(
    plugins: Sequence[type[Plugin] | Plugin], *, expected_failed_checks: ExpectedFailures | None = None
) -> pytest.MarkDecorator:
    """Give a test the arguments ``plugin`` and ``check``, once for each plug-in and each check of its kind.

    The test calls ``check`` with what the check is about: a predictor as it is; a source that is open on some run;
    ``ApplierCase`` or ``BackendCase`` of an applier or a backend. Its id is ``name-check``; of an instance, the name
    has the settings that are not the default.

    ``expected_failed_checks`` maps a plug-in to the reasons, by check, why some fail: these are ``xfail(strict=True)``,
    so that one which passes all the same is a failed test. Raises ``ConfigError`` for an unknown check, for one
    without a reason, and for what is no plug-in that there are checks for.
    """
    import pytest

    arguments = []
    for plugin in plugins:
        kind = _kind(plugin)
        expected = validated(kind, expected_failed_checks(plugin) if expected_failed_checks is not None else None)
        for name, check in checks_of(kind).items():
            marks = [pytest.mark.xfail(reason=expected[name], strict=True)] if name in expected else []
            arguments.append(pytest.param(plugin, check, marks=marks, id=f"{_label(plugin)}-{name}"))
    return pytest.mark.parametrize(("plugin", "check"), arguments)


def _kind(plugin: object) -> CheckedKind:
    cls = plugin if isinstance(plugin, type) else type(plugin)
    found = next((kind for kind, base in _BASES.items() if issubclass(cls, base)), None)
    if found is None:
        raise ConfigError(f"{plugin!r} is neither a class nor an instance of a {', '.join(_BASES)}")
    return found


def _label(plugin: type[Plugin] | Plugin) -> str:
    if isinstance(plugin, type):
        return plugin.name
    set_here = plugin.config.model_dump(exclude_defaults=True)
    fields = ",".join(f"{key}={value}" for key, value in set_here.items())
    return f"{plugin.name}({fields})" if fields else plugin.name
