"""Options that contradict are refused by name, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import LoraRun, Outcome


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "CONFIG", "--horizon", 50), "--horizon is of an extrapolation"),
        (("plan", "CONFIG", "--predictor", "relex"), "--predictor is of an extrapolation"),
        (("plan", "CONFIG", "--set", "window=5"), "--set is of an extrapolation"),
        (("analyze", "--checkpoints", "RUN", "--spectrum", "--compressor", "lanczos"), "does not know the spectrum"),
        (("analyze", "--checkpoints", "RUN", "--address", "auto"), "address is of a Ray cluster"),
    ],
)
def test_what_contradicts_is_refused_by_name(
    words: tuple[object, ...], message: str, cli: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("steps: 100\n")
    outcome = cli(*({"CONFIG": config, "RUN": lora_run.path}.get(str(word), word) for word in words))
    assert outcome.code == 2
    assert message in outcome.err
