"""What the GPUs can do (from data sheets), and how much of it a run gets (constants that are on no data sheet)."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.errors import ConfigError

GPUS_PER_NODE = 8
GiB = 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float  # bytes
    bf16: float  # FLOP/s of dense matrix products
    fp8: float  # FLOP/s
    bandwidth: float  # of the memory [bytes/s]
    nvlink: float  # one way [bytes/s]
    network: float  # its share of the node's [bytes/s]


# NVIDIA data sheets of A100 80GB SXM, H100 SXM and H200 SXM (dense numbers, not the sparse ones); memory as nvidia-smi
# shows it (81 920, 81 559 and 143 771 MiB); network of DGX A100 (200 Gb/s a GPU) and DGX H100/H200 (400 Gb/s a GPU).
# An A100 has no FP8: its products run in bf16.
A100 = Gpu("a100", 81920 * 2**20, 312e12, 312e12, 2.039e12, 300e9, 25e9)
H100 = Gpu("h100", 81559 * 2**20, 989e12, 1979e12, 3.35e12, 450e9, 50e9)
H200 = Gpu("h200", 143771 * 2**20, 989e12, 1979e12, 4.8e12, 450e9, 50e9)
GPUS = {gpu.name: gpu for gpu in (A100, H100, H200)}

# Share of the peak that the models' matrix products get, forward and backward. Megatron-LM reports 44 to 52 % on A100s
# for models of 1.7 B to 1 T parameters in large batches (arXiv 2104.04473, table 1); rows of unequal length get less.
COMPUTE_EFFICIENCY = 0.40
# FP8 doubles the peak but not the speed: casts, norms, attention and the head stay in bf16. 0.28 of the FP8 peak is 1.4
# times bf16's speed. Assumed.
FP8_EFFICIENCY = 0.28
# Share of the memory bandwidth that a decoding step gets. Assumed; memory-bound kernels reach 70 to 90 % of the peak.
DECODE_EFFICIENCY = 0.70
# Scheduler, sampling and launches of one decoding step with CUDA graphs [s]. Assumed: on an H100 vLLM decodes a single
# response of a model of 1 to 2 B parameters at 250 to 400 tokens/s, and reading the weights takes 1 ms of such a step.
DECODE_OVERHEAD = 0.002
# Share of a link that NCCL's collectives get. Assumed: nccl-tests shows about 360 of 450 GB/s on NVLink.
COLLECTIVE_EFFICIENCY = 0.80
# Cost of one more rank in a ring [s]. Assumed: a few microseconds of latency in NCCL and the network, twice around.
HOP_LATENCY = 10e-6
# The rest of a step [s], fitted to all the hours together that docs/planner.md lists; time.py's overhead_seconds says
# what it is, and what is left of it in smaller runs.
STEP_OVERHEAD = 30.0
# The least of those runs: parameters of student and teacher together, and tokens that a step's responses may have.
FITTED_PARAMETERS = 3.5e9
FITTED_TOKENS = 256 * 1024

# Bytes that no part of the run accounts for: CUDA context, NCCL's buffers, the allocator's fragments. Assumed.
RESERVED = 3 * GiB
# Peak of vLLM's activations and CUDA graphs, which it subtracts from what it keeps for the KV cache. Assumed.
ENGINE_WORKSPACE = 2 * GiB


def gpu_named(name: str) -> Gpu:
    """The GPU of this name. Raises `ConfigError` for unknown names, and for a CPU, which cannot be planned for."""
    if name == "cpu":
        raise ConfigError(
            "gpu = 'cpu' cannot be planned, since cores, caches and memory differ too much: run the recipe (the tiny "
            f"ones take minutes), or plan it for {', '.join(GPUS)} with --gpu"
        )
    if name not in GPUS:
        raise ConfigError(f"gpu = {name!r} is not known: choose one of {', '.join(GPUS)}")
    return GPUS[name]
