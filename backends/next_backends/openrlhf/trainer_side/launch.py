"""Starts OpenRLHF's own command line inside a Ray of its own, with the hooks that were asked for.

Usage: launch.py SETTINGS.json OPTION ...; runs in OpenRLHF's environment and imports nothing of next-core.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

CLI = "openrlhf.cli.train_ppo_ray"


def main() -> None:
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import ray

    ray.init(**settings["ray"], runtime_env={"env_vars": settings["env"]})
    resources: Any = ray.cluster_resources
    there, needed = resources().get("GPU", 0), settings["gpus"]
    if there < needed:
        sys.exit(f"the run needs {needed} GPUs (actor, reference and engines) and Ray has {there:g}")
    if settings["hooks"]:
        from install import install

        install(settings)
    sys.argv = [CLI, *sys.argv[2:]]
    runpy.run_module(CLI, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
