"""The smallest run in which everything happens: jumps, a rollback, the mean at the end, checkpoints and a curve."""

from pathlib import Path
from typing import Any

import yaml

from next_core.config import make_config
from next_core.run_config import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 14
SAVE_EVERY = 3
"""The trainer's checkpoints lie within the windows in which jumps are judged, which end three steps after them."""
SCHEDULE = {"observe": 4, "every": 2, "horizon": 2, "jump_every": 2, "settle": 3, "alpha": 3.0, "average": 8}
GUARDS = {"recovery": 3, "tolerance": 0.0, "max_drop": 1.0}
LOGGED = {"logging_steps": 1}  # What TRL has gathered since it last logged is in none of its checkpoints
PREDICTOR = {"name": "secant", "window": 2}


def raw_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of a second or two, as a config file has it; its data, a few prompts, are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 64), ("validation", 8), ("test", 8)):
        lines = (EXAMPLES / "arithmetic" / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    raw: dict[str, Any] = {
        "steps": STEPS,
        "seed": 0,
        "save_every": SAVE_EVERY,
        "measure_every": 4,
        "training": {
            "model": str(EXAMPLES / "arithmetic" / "base"),
            "algorithm": "grpo",
            "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
            "reward": "math-verify",
            "lora": {"rank": 2, "alpha": 4},
            "learning_rate": 2e-3,
            "prompts_per_step": 2,
            "generations": 4,
            "max_new_tokens": 3,
        },
        "backend": {"name": "trl", "args": LOGGED},
        "predictor": PREDICTOR,
        "schedule": SCHEDULE,
        "guards": GUARDS,
    }
    for key, value in changes.items():
        raw[key] = raw[key] | value if key in ("training", "schedule", "guards") else value
    return raw


def needed_config(folder: Path) -> dict[str, Any]:
    """The same run, which deletes what it does not need: its trainer keeps two checkpoints to resume from."""
    raw = raw_config(folder, schedule={"keep": "needed", "average": None})
    return raw | {"backend": {"name": "trl", "args": LOGGED | {"save_total_limit": 2}}}


def scaling_config(folder: Path) -> dict[str, Any]:
    """The same run with steps that are scaled: they are too large at first, which is undone."""
    raw = raw_config(folder, training={"learning_rate": 2e-2})
    scaling = {"name": "step-scale", "block": 2}
    return raw | {"predictor": scaling, "schedule": {"every": 1, "average": 8}, "guards": {}}


def dumped(raw: dict[str, Any]) -> str:
    """A run's fields as a config file has them."""
    return yaml.safe_dump(raw)


def checked(raw: dict[str, Any]) -> RunConfig:
    """A run from its fields."""
    return make_config(raw, base=EXAMPLES)
