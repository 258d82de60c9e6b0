"""Start verl's own training with a trainer that next-core can pause: ``launch.py SETTINGS.json OVERRIDE...``.

Runs in verl's environment. verl's recipes bring a task runner of their own in the same way.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ray
from composed import compose_config
from omegaconf import OmegaConf, open_dict
from verl.trainer import main_ppo

TaskRunner: Any = main_ppo.TaskRunnerV1.__ray_metadata__.modified_class


class PausingTaskRunner(TaskRunner):  # type: ignore[misc]
    """verl's task runner with a trainer that pauses. Runs in a Ray actor."""

    def run(self, config: Any) -> None:
        from pausing_trainer import PausingTrainer
        from verl.trainer.ppo.v1 import trainer_base

        trainer_base.TRAINER_REGISTRY["sync"] = PausingTrainer
        super().run(config)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = compose_config(sys.argv[2:])
    with open_dict(config):
        config.next_core = OmegaConf.create(settings["control"])
        config.ray_kwargs.ray_init = OmegaConf.create(settings["ray"])
    main_ppo.run_ppo(config, task_runner_class=ray.remote(PausingTaskRunner))


if __name__ == "__main__":
    main()
