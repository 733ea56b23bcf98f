"""An H100 that is a stub: enough of one for vLLM's CUDA wheel to make its configurations where there is no driver.

Its compiled modules want libcuda.so when they are loaded, and flash attention asks the device what it can do: they are
stubs as well, which nothing here calls.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch  # noqa: F401  before vLLM's modules: they need its libraries

MEMORY = 81559 * 2**20  # bytes that an H100 SXM says it has
EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm._qutlass_C", "vllm.cumem_allocator")
FLASH = ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface")


def _says_yes(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: True


def _stub(name: str) -> ModuleType:
    module: Any = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None), []
    module.__getattr__ = _says_yes
    sys.modules[name] = module
    return module


def install() -> None:
    """Make vLLM believe in eight H100s, before anything of it has looked for a device."""
    for name in (*EXTENSIONS, *FLASH):
        _stub(name)
    import vllm.platforms as platforms
    from vllm import _custom_ops
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class H100(CudaPlatformBase):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda cls, device_id=0: MEMORY)
        is_fully_connected = classmethod(lambda cls, devices: True)
        device_count = classmethod(lambda cls: 8)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
        is_integrated_gpu = classmethod(lambda cls, device_id=0: False)
        is_cumem_allocator_available = classmethod(lambda cls: True)

    platforms._current_platform = H100()
    for name in dir(_custom_ops):
        if name.startswith("cutlass") and name.endswith(("_supported", "_supports_fp8", "_supports_block_fp8")):
            setattr(_custom_ops, name, lambda *args: True)
    # It looks at a model's class in a process of its own, which would have no stubs.
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()
