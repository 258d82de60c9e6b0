"""Checks for plug-ins: whether a predictor, source, applier or backend keeps the promises of its interface.

One call, such as ``check_predictor(MyPredictor)``, runs all checks and raises an ``ExceptionGroup`` of all failures.
Under pytest, ``parametrize_with_checks`` makes each check a test. The kit makes the runs that the checks need from a
seed (``lora_run``, ``dense_run``; on disk ``write_lora_run``).
"""

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
