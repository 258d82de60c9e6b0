"""A CPU as a platform of verl, registered by its own extension point; imported through VERL_USE_EXTERNAL_MODULES."""

import contextlib
import types
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

MEMORY = 8 << 30  # Bytes that are said to be a device's


def nothing(*_: Any) -> None:
    return None


FIGURES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
CALLS = ("set_device", "synchronize", "empty_cache", "current_stream", "ipc_collect")
MODULE = types.SimpleNamespace(
    is_available=lambda: False,
    current_device=lambda: "cpu",
    device_count=lambda: 8,
    get_device_name=lambda *_: "cpu",
    get_device_properties=lambda *_: types.SimpleNamespace(name="cpu", total_memory=MEMORY),
    mem_get_info=lambda *_: (MEMORY, MEMORY),
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    **{name: lambda *_: 0 for name in FIGURES},
    **dict.fromkeys(CALLS, nothing),
)


def make_platform() -> type:
    answers = {"device_name": "cpu", "vendor_name": "cpu", "device_module": MODULE}
    calls = {
        "is_available": True,
        "is_platform_available": True,
        "current_device": "cpu",
        "device_count": 8,
        "communication_backend_name": "gloo",
        "visible_devices_envvar": "CUDA_VISIBLE_DEVICES",
        "ray_resource_name": "GPU",
        "ray_noset_envvars": [],
        "is_ipc_supported": False,
        "get_device_capability": (None, None),
        "nvtx_range": contextlib.nullcontext(),
    }
    members: dict[str, Any] = dict.fromkeys(PlatformBase.__abstractmethods__, nothing)
    members |= {name: property(lambda self, value=value: value) for name, value in answers.items()}
    members |= {name: (lambda self, *_, value=value, **__: value) for name, value in calls.items()}
    members["manual_seed"] = members["manual_seed_all"] = lambda self, seed: torch.manual_seed(seed)
    return type("PlatformCPU", (PlatformBase,), members)


def begin_with_gloo(begin: Any) -> Any:
    """Return ``init_process_group`` for what verl asks of a CPU and torch refuses: ``cpu:gloo,cpu:gloo``."""

    def begun(backend: str | None = None, *arguments: Any, **more: Any) -> Any:
        return begin("gloo" if backend and "cpu:gloo" in backend else backend, *arguments, **more)

    return begun


PlatformRegistry.register(platform="cpu")(make_platform())
torch.distributed.init_process_group = begin_with_gloo(torch.distributed.init_process_group)
