"""Start OpenRLHF's own command line in a Ray of its own, with hooks: ``launch.py SETTINGS.json OPTION...``.

Runs in OpenRLHF's environment. Of next-core it imports the access to live weights, which needs nothing else of ours.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

CLI = "openrlhf.cli.train_ppo_ray"


def install(control: dict[str, Any]) -> None:
    """Let next-core pause the run, save its state with OpenRLHF's, and send merged LoRA weights to vLLM.

    OpenRLHF has no callbacks. Ray sends the classes ``modified_class`` to workers by value, so changing them in the
    process that starts the run is enough, and none of OpenRLHF's files changes.
    """
    import control_client
    import controller
    import likelihood
    import lora
    import policy
    import ray.cloudpickle
    import zero_policy
    from openrlhf.trainer.ppo_trainer import PPOTrainer
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    pickling: Any = ray.cloudpickle
    for module in (control_client, controller, likelihood, lora, policy, zero_policy):
        pickling.register_pickle_by_value(module)
    actor: Any = PolicyModelActor.__ray_metadata__.modified_class
    actor.broadcast_to_vllm = lora.broadcast_to_vllm
    actor.save_checkpoint = zero_policy.saving_steps(actor.save_checkpoint)
    controller.take_over(PPOTrainer.__ray_metadata__.modified_class, control)


def main() -> None:
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import ray

    ray.init(**settings["ray"], runtime_env={"env_vars": settings["env"]})
    resources: Any = ray.cluster_resources
    there, needed = resources().get("GPU", 0), settings["gpus"]
    if there < needed:
        sys.exit(f"the run needs {needed} GPUs (actor, reference and engines) and Ray has {there:g}")
    install(settings["control"])
    sys.argv = [CLI, *sys.argv[2:]]
    runpy.run_module(CLI, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
