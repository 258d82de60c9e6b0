"""The entry point: help, errors with their exit codes, and the commands that read no checkpoints."""

import errno
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from next_core.cli.console import Output
from next_core.cli.run_command import show_result
from next_core.cycle.run_result import RunResult
from next_core.errors import BackendError, CheckpointError, ConfigError, GuardError, PluginError, StorageError
from tests.cli.conftest import assert_fails, facts
from tests.conftest import Cli, Outcome


def run_python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['next-core', '--help']\nfrom next_core.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = run_python("-c", code, cwd=tmp_path)
    *shown, imported = done.stdout.splitlines()
    assert imported == "[]"
    words = " ".join(shown)
    for word in ("run", "extrapolate", "analyze", "backtest", "compare", "plan", "report", "plugins", "schema"):
        assert f" {word} " in words
    assert "Exit codes" in words


def test_python_m_next_core_prints_an_error_as_one_line_with_its_kind(tmp_path: Path) -> None:
    done = run_python("-m", "next_core", "report", "x", "--cache", "y", "--no-cache", cwd=tmp_path)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert_fails(outcome, 2, "config-contradiction", "ConfigError: ", "--cache", "--no-cache")
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (CheckpointError("x"), 3),
        (GuardError("x"), 4),
        (PluginError("x"), 5),
        (BackendError("x"), 6),
        (StorageError("x"), 7),
        (OSError(28, "No space left on device", "x"), 7),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(errno.EPIPE, "x"), 1),
    ],
)
def test_errors_have_exit_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("next_core.config.json_schema", fail)
    assert cli("schema").code == code


def test_an_unexpected_error_is_not_hidden(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("next_core.config.json_schema", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("schema")


def test_schema_and_version_are_printed(cli: Cli) -> None:
    assert {"steps", "predictor", "schedule"} <= set(json.loads(cli("schema").out)["properties"])
    assert cli("--version").out == f"next-core {version('next-core')}\n"


CONFIG = """
steps: 100
training: {model: base, data: {train: train.jsonl}}
predictor: secant
schedule: {observe: 50, every: 5}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


def test_a_dry_run_prints_the_plan_alone(cli: Cli, config: Path, tmp_path: Path) -> None:
    outcome = cli("run", config, "--out", tmp_path / "run", "--dry-run", "--json")
    assert facts(outcome)["compute"]["jumps after"] == [50]
    assert "jumps after" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_result_is_shown_with_its_jumps_and_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    made = {"step": 50, "predictor": "[auto]", "alpha": 4.0, "norm_ratio": 4.25, "accepted": True, "reason": "all good"}
    refused = made | {"step": 60, "norm_ratio": None, "accepted": False, "reason": "too long"}
    result = RunResult(
        steps=100,
        seconds={"rl": 12.0, "ours": 3.0, "ours_probe": 2.5, "total": 40.0},
        accuracy={"start": 0.2, "before_jump": None, "after_jump": None, "final": 0.5, "before_average": 0.45},
        jumps=[made | {"accuracy_before": 0.3, "accuracy_after": 0.31}, refused],
        folder="runs/a",
        control={"steps": 100, "seconds": 11.0, "accuracy": {"final": 0.4}},
        average={"accepted": True, "reason": "better on validation"},
        advice="raise the learning rate",
    )
    show_result(result, Output(as_json=False))
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("with jumps 100 0.200 - - 0.500", "100 0.200 0.400", "50 [auto] 4 4.25 0.300 → 0.310", "all good"):
        assert words in shown
    for words in ("60 [auto] 4 - - → - refused: too long", "better on validation", "0.450", "0.50", "total 40.0"):
        assert words in shown
    assert "raise the learning rate" in shown
