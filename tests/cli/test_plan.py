"""``next-core plan``."""

from pathlib import Path

import pytest

from tests.cli.conftest import assert_fails, facts
from tests.conftest import STEPS, Cli, LoraRun


def test_a_plan_of_checkpoints_writes_nothing(cli: Cli, lora_run: LoraRun, tmp_path: Path) -> None:
    arguments = ("--checkpoints", lora_run.path, "--horizon", 20, "--predictor", "next-mlp", "--out", tmp_path / "out")
    outcome = cli("plan", *arguments, "--json")
    found = facts(outcome)
    assert found["read"]["steps"] == list(STEPS)
    assert found["compute"]["predictor"] == "next-mlp"
    assert found["write"]["bytes"] > 0
    assert found["time"]["compress"] > 0
    assert not (tmp_path / "out").exists()
    assert "bytes a checkpoint" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "name"),
    [
        ((), 2, "config-contradiction", "--checkpoints"),
        (("--checkpoints", "RUN"), 2, "config-contradiction", "--horizon"),
        (("CONFIG", "--checkpoints", "RUN"), 2, "config-contradiction", "CONFIG"),
        (("CONFIG", "--horizon", 50), 2, "config-contradiction", "CONFIG"),
        (("CONFIG", "--predictor", "relex"), 2, "config-contradiction", "CONFIG"),
        (("--checkpoints", "RUN", "--horizon", 10, "--predictor", "secnat"), 5, "plugin", "secant"),
        (("--checkpoints", "RUN", "--horizon", 10, "--applier", "merged-model"), 2, "config", ""),
        (("--checkpoints", "nowhere", "--horizon", 10), 3, "checkpoint", "nowhere"),
        (("--checkpoints", "RUN", "--horizon", 10, "--rank", 0), 2, "config-invalid-value", "rank"),
        (("none.yaml",), 2, "config", "none.yaml"),
    ],
)
def test_an_impossible_plan_fails_with_its_kind(
    arguments: tuple[object, ...], code: int, kind: str, name: str, cli: Cli, lora_run: LoraRun, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("steps: 100\n")
    given = {"CONFIG": config, "RUN": lora_run.path}
    assert_fails(cli("plan", *(given.get(str(word), word) for word in arguments)), code, kind, name)
