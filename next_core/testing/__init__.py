"""Checks for plug-ins: whether a predictor, source, applier or backend keeps the promises of its interface.

One call runs all checks and raises an ``ExceptionGroup`` of all failures; under pytest, ``parametrize_with_checks``
makes each check a test::

    from next_core.testing import check_predictor, parametrize_with_checks

    check_predictor(MyPredictor)

    @parametrize_with_checks([MyPredictor, MyPredictor(MyConfig(window=5))])
    def test_it_keeps_the_contract(plugin, check):
        check(plugin)

The kit makes the runs that the checks need from a seed (``lora_run``, ``dense_run``; on disk ``write_lora_run``).
Only ``parametrize_with_checks`` needs pytest.
"""

from __future__ import annotations

from next_core.testing.applier_checks import ApplierCase, check_applier
from next_core.testing.backend_checks import BackendCase, check_backend
from next_core.testing.check_runner import Check, CheckError, checks_of
from next_core.testing.predictor_checks import check_predictor, parametrize_with_checks
from next_core.testing.source_checks import check_source
from next_core.testing.synthetic_runs import SyntheticRun, dense_run, lora_run, write_lora_run

__all__ = [
    "ApplierCase",
    "BackendCase",
    "Check",
    "CheckError",
    "SyntheticRun",
    "check_applier",
    "check_backend",
    "check_predictor",
    "check_source",
    "checks_of",
    "dense_run",
    "lora_run",
    "parametrize_with_checks",
    "write_lora_run",
]
