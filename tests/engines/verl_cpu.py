"""A platform for verl on which its workers run without a GPU: ``VERL_PLATFORM=cpu``, gloo instead of NCCL.

verl imports it in every process through ``VERL_USE_EXTERNAL_MODULES``; ``VERL_ENGINE_DEVICE=cuda`` then picks
the engine that a GPU would have.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformRegistry
from verl.plugin.platform.platform_base import PlatformBase

torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]  # for copies to a GPU


def nothing(*_: Any, **__: Any) -> int:
    return 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):  # type: ignore[misc]  # verl has no types
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("current_device", "synchronize", "is_available")},
        empty_cache=nothing,
        get_device_name=lambda: "CPU",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        memory_allocated=nothing,
        memory_reserved=nothing,
        max_memory_allocated=nothing,
        max_memory_reserved=nothing,
        mem_get_info=lambda *_: (1, 1),
    )
    is_available = is_ipc_supported = lambda self: True
    current_device = lambda self: torch.device("cpu")  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    set_device = synchronize = manual_seed = manual_seed_all = nothing
    set_allocator_settings = empty_cache = profiler_start = profiler_stop = nothing
    get_device_capability = lambda self, *_: (None, None)  # noqa: E731
    communication_backend_name = lambda self: "gloo"  # noqa: E731
    visible_devices_envvar = lambda self: "CUDA_VISIBLE_DEVICES"  # noqa: E731
    nvtx_range = lambda self, *_: nullcontext()  # noqa: E731
    ray_resource_name = lambda self: "CPU"  # noqa: E731
    ray_noset_envvars = lambda self: list[str]()  # noqa: E731
    cudart = lambda self: None  # noqa: E731
