"""An H100 that is a stub: enough of one for vLLM's CUDA wheel to make its configurations where there is no driver.

vLLM's compiled modules want libcuda.so.1 when they are loaded: a library of that name is compiled whose functions all
say that there is no device. Flash attention asks the device what it can do, and is a stub too; nothing here calls it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  before vLLM's modules: they need its libraries

MEMORY = 81559 * 2**20  # bytes that an H100 SXM says it has
FLASH = ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def _says_yes(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: True


def _stub(name: str) -> None:
    module: Any = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None), []
    module.__getattr__ = _says_yes
    sys.modules[name] = module


def load_driver(folder: Path) -> None:
    """Make in `folder`, and load, a libcuda.so.1 with the functions that vLLM's modules want of it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    modules = [str(path) for place in spec.submodule_search_locations for path in Path(place).glob("*.so")]
    listed = subprocess.run(["nm", "-D", "--undefined-only", *modules], capture_output=True, text=True, check=True)
    names = sorted(set(re.findall(r" U (cu[A-Z]\w*)", listed.stdout)))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in names))
    compiler = os.environ.get("CC", "cc")
    arguments = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run([compiler, *arguments], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def install(folder: Path) -> None:
    """Make vLLM believe in eight H100s. folder: for the driver that is none."""
    load_driver(folder)
    for name in FLASH:
        _stub(name)
    import vllm.platforms as platforms
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

    ours: Any = H100()
    platforms._current_platform = ours
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "current_platform" in vars(module):  # asked when it was imported
            vars(module)["current_platform"] = ours
    from vllm import _custom_ops
    from vllm.model_executor.models import registry

    for name in dir(_custom_ops):
        if name.startswith("cutlass") and name.endswith(("_supported", "_supports_fp8", "_supports_block_fp8")):
            setattr(_custom_ops, name, lambda *args: True)
    registry._run_in_subprocess = lambda look: look()  # a model's class is looked at in a process without stubs
