"""A CPU as a platform of verl, registered by its own extension point; imported through VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

import types
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

MODULE = types.SimpleNamespace(
    is_available=lambda: False,
    current_device=lambda: "cpu",
    device_count=lambda: 2,
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


def _nothing(self: Any, *arguments: Any) -> None:
    return None


def _make() -> type:
    answers = {"device_name": "cpu", "vendor_name": "cpu", "device_module": MODULE}
    calls = {
        "is_available": True,
        "is_platform_available": True,
        "current_device": "cpu",
        "device_count": 2,
        "communication_backend_name": "gloo",
        "visible_devices_envvar": "CUDA_VISIBLE_DEVICES",
        "ray_resource_name": "CPU",
        "ray_noset_envvars": [],
        "is_ipc_supported": False,
        "get_device_capability": (None, None),
    }
    members: dict[str, Any] = dict.fromkeys(PlatformBase.__abstractmethods__, _nothing)
    members |= {name: property(lambda self, value=value: value) for name, value in answers.items()}
    members |= {name: (lambda self, *_, value=value, **__: value) for name, value in calls.items()}
    members["manual_seed"] = members["manual_seed_all"] = lambda self, seed: torch.manual_seed(seed)
    return type("PlatformCPU", (PlatformBase,), members)


PlatformRegistry.register(platform="cpu")(_make())
