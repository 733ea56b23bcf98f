"""A fresh process for test_platform.py: what torch and transformers do before and after `platform.prepare()`.

worker_platform.py MODEL_DIR OUT_FILE
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prune_opd import platform

CUDA = torch.device("cuda")
# How each patched factory is called, without its device.
CALLS: dict[str, tuple[Any, ...]] = {
    "tensor": ([1.0, 2.0],),
    "zeros": (2,),
    "ones": (2,),
    "empty": (2,),
    "full": ((2,), 3.0),
    "arange": (2,),
    "rand": (2,),
    "randn": (2,),
    "randint": (5, (2,)),
    "zeros_like": (torch.ones(2),),
    "empty_like": (torch.ones(2),),
}


def devices() -> dict[str, list[str]]:
    """The device type of what asks for "cuda", by how it asks. Index and torch.device spell the same."""
    spellings = ("cuda", "cuda:0", CUDA)
    found = {
        name: [getattr(torch, name)(*arguments, device=device).device.type for device in spellings]
        for name, arguments in CALLS.items()
    }
    x, module = torch.ones(2), torch.nn.Linear(2, 2)
    found["to"] = [x.to(device).device.type for device in spellings]
    found["to with a type"] = [x.to(device, torch.float64).device.type for device in spellings]
    found["to, by name"] = [x.to(device=device).device.type for device in spellings]
    found["cuda()"] = [x.cuda().device.type, x.cuda(0).device.type, x.cuda(non_blocking=True).device.type]
    found["module"] = [module.cuda().weight.device.type, module.to("cuda").weight.device.type]
    found["current device"] = [torch.zeros(1, device=torch.cuda.current_device()).device.type]
    return found


def other_devices() -> dict[str, str]:
    """What does not ask for CUDA keeps its device."""
    with torch.device("meta"):
        in_context = torch.arange(3).device.type
        asked = torch.zeros(1, device="cpu").device.type
    plain = torch.zeros(1).device.type
    return {
        "in a meta context": in_context,
        "in it, by name": asked,
        "meta": torch.ones(1, device="meta").device.type,
        "plain": plain,
    }


def types() -> dict[str, list[bool]]:
    """Equals the cuda name (both ways round), equals its own, equals another's, differs from the cuda name."""
    found = {}
    for dtype, name in ((torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half")):
        type_ = torch.ones(1, dtype=dtype).type()
        cuda, own = f"torch.cuda.{name}Tensor", f"torch.{name}Tensor"
        found[name] = [type_ == cuda and cuda == type_, type_ == own, type_ == "torch.cuda.LongTensor", type_ != cuda]
    cast = torch.ones(1).type(torch.int32)
    found["cast"] = [cast.dtype == torch.int32, torch.ones(1).type("torch.DoubleTensor").dtype == torch.float64]
    return found


def rotary(model_dir: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return {"inv_freq": model.model.rotary_emb.inv_freq.tolist(), "meta": any(p.is_meta for p in model.parameters())}


def generators() -> dict[str, bool]:
    """rng_state → JSON → load_rng_state, in the middle of all three streams; and `untouched_rng`."""

    def draw() -> list[Any]:
        normal = [random.gauss(0, 1), float(np.random.randn()), torch.randn(3).tolist()]
        return [*normal, random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()]

    draw()  # the Gaussian generators now hold the second of a pair
    state = json.loads(json.dumps(platform.rng_state()))
    expected = draw()
    after = platform.rng_state()
    platform.load_rng_state(state)
    again = draw()
    platform.load_rng_state(state)
    with platform.untouched_rng():
        inside = draw()
        torch.manual_seed(5)
    outside = draw()
    try:
        with platform.untouched_rng():
            draw()
            raise KeyError
    except KeyError:
        kept = platform.rng_state() == after
    return {
        "drawn again": again == expected,
        "state again": platform.rng_state() == after,
        "untouched": inside == outside == expected,
        "untouched after an error": kept,
    }


def main(model_dir: Path, out: Path) -> None:
    machine = platform.prepare()
    results = {
        "machine": [machine.name, machine.device.type, machine.backend, machine.is_cpu],
        "once": platform.prepare() is machine,
        "wandb came along": "wandb" in sys.modules,
        "bf16 sums in parts": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "devices": devices(),
        "other devices": other_devices(),
        "types": types(),
        "rotary": rotary(model_dir),
        "generators": generators(),
    }
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
