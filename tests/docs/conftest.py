"""A folder as a reader of the pages has one: the examples, a run that was trained, other checkpoints, a comparison."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from next_core.plugins import registry
from tests.docs.blocks import ROOT
from tests.report import made

STEPS = 120


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a real run of a few roll-outs a step in runs/a, its checkpoints 10 steps apart, one jump."""
    from next_core.config import make_config
    from next_core.cycle.run import run

    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "benchmarks" / "compare", folder / "benchmarks" / "compare")
    task = folder / "examples" / "arithmetic"
    training = {
        "model": str(task / "base"),
        "data": {split: str(task / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "learning_rate": 1e-3,
        "prompts_per_step": 2,
        "generations": 2,
        "max_new_tokens": 2,
    }
    config = make_config(
        {
            "steps": STEPS,
            "training": training,
            "predictor": {"name": "secant", "window": 10},
            "schedule": {"observe": 60, "every": 10, "horizon": 10},
            "guards": {"probe": False},
        }
    )
    run(config, folder / "runs" / "a")
    shutil.copytree(task / "base", folder / "models" / "base")
    for name, step in (("exp/lora_s10", 10), ("exp/lora_s20", 20), ("archive/checkpoint-30", 30)):
        shutil.copytree(folder / "runs" / "a" / "checkpoints" / f"step-{step:06}", folder / name)
    recorded = ROOT / "tests" / "sources" / "recorded" / "openrlhf"
    shutil.copytree(recorded / "full-zero2", folder / "runs" / "full")
    shutil.copytree(recorded / "base", folder / "models" / "full")
    made.write_comparison(folder / "runs" / "compare", made.comparison(seeds=2))
    made.write_comparison(folder / "runs" / "predictors", made.comparison(seeds=2))
    return folder


@pytest.fixture
def reader(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    folder = Path(shutil.copytree(trained, tmp_path / "reader"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    """What a page registers is gone after it."""
    registry.cache_clear()
    yield
    registry.cache_clear()
