"""What verl makes of overrides: ``composed.py VERSION OVERRIDE...`` prints one line of JSON; starts nothing.

Exits with status 2 when verl or Hydra refuses them.
"""

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

ANSWER = "next-core answer: "


def compose_config(overrides: Sequence[str]) -> Any:
    """Return verl's config with these overrides, after verl's own checks."""
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config


def main(version: str, *overrides: str) -> None:
    if metadata.version("verl") != version:
        sys.exit(f"it has verl {metadata.version('verl')}")
    try:
        config = compose_config(overrides)
    except Exception as error:  # Hydra, omegaconf and verl have errors of many kinds
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    print(f"\n{ANSWER}{json.dumps({'steps': config.trainer.total_training_steps})}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
