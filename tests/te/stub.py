"""A STUB of Transformer Engine's compiled half, for tests without a GPU. Nothing in here computes anything.

Transformer Engine is a Python package beside a compiled extension (`transformer_engine_torch`) and Triton kernels. The
package is real here: its modules, their parameters and the checkpoints they make. Extension and kernels are stubs: the
extension's enums have the values of the real 2.11.0, and every function of either raises when it is called. So a model
can be built, filled, saved and loaded, but never run.

`install()` comes before any import of megatron-core, in a process of its own that has the packages of
requirements/te-test.txt on its path.
"""

from __future__ import annotations

import enum
import functools
import importlib
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

ENUMS = Path(__file__).with_name("extension_enums.json")
KERNELS = "transformer_engine.pytorch.triton"


class StubCalledError(RuntimeError):
    """A kernel was called: that needs a GPU and the compiled extension."""


class StubModule(types.ModuleType):
    """A module whose every name is a function, or a class if it is spelt like one, that raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module = self.__name__

        def call(*args: Any, **kwargs: Any) -> Any:
            raise StubCalledError(
                f"{module}.{name} is a stub: it has no kernel, and needs a GPU and the real extension"
            )

        stub = type(name, (), {"__init__": call}) if name[0].isupper() else call  # classes are used as base classes
        setattr(self, name, stub)
        return stub


def install() -> None:
    """Make `import transformer_engine.pytorch` work, and its modules constructible, on a machine without CUDA."""
    extension = StubModule("transformer_engine_torch")
    for name, members in json.loads(ENUMS.read_text()).items():
        setattr(extension, name, enum.IntEnum(name, members))
    extension.get_cudnn_version = lambda: 92000  # type: ignore[attr-defined]
    extension.get_cublasLt_version = lambda: 130101  # type: ignore[attr-defined]
    sys.modules["transformer_engine_torch"] = extension
    for name in ("", ".pad", ".permutation", ".cross_entropy"):
        sys.modules[KERNELS + name] = StubModule(KERNELS + name)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: load no CUDA libraries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it found no extension
        common = importlib.import_module("transformer_engine.common")
    del os.environ["NVTE_PROJECT_BUILDING"]
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    _let_modules_be_constructed()


def _let_modules_be_constructed() -> None:
    """Its modules assert that CUDA is there when they are made, and use it only when they run."""
    import torch
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    original = TransformerEngineBaseModule.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        is_available = torch.cuda.is_available
        torch.cuda.is_available = lambda: True
        try:
            original(self, *args, **kwargs)
        finally:
            torch.cuda.is_available = is_available

    TransformerEngineBaseModule.__init__ = init
