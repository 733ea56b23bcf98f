"""What low-rank adapters change in a plan: parameters that are trained, bytes that are kept, products that are made."""

from __future__ import annotations

from prune_opd.config import LoraConfig
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.counts import Count, largest_rank
from prune_opd.plan.setting import Setting

WHOLE = 2  # matrix products of a backward pass, in those of a forward pass: the input's gradient and the weight's


def matrices(spec: ModelSpec, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices of a layer that have an adapter, by target."""
    width, groups = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes = {
        "linear_qkv": (width + 2 * groups, spec.hidden),
        "linear_proj": (spec.hidden, width),
        "linear_fc1": (2 * spec.ffn, spec.hidden),
        "linear_fc2": (spec.hidden, spec.ffn),
    }
    return {target: shapes[target] for target in lora.targets} if lora.on else {}


def adapter_parameters(spec: ModelSpec, lora: LoraConfig, tensor: int = 1, layers: int | None = None) -> int:
    """Parameters of the adapters of `layers` (None: all) on one of `tensor` ranks: of A and B one is cut, one whole."""
    total = 0
    for target, (rows, columns) in matrices(spec, lora).items():
        by_columns = target in ("linear_proj", "linear_fc2")
        total += lora.rank * (rows + columns // tensor if by_columns else rows // tensor + columns)
    return total * (spec.layers if layers is None else layers)


def adapters_on_rank(setting: Setting) -> int:
    """Of the student, on any rank: every stage has as many layers."""
    layout = setting.student_layout
    layers = setting.student.layers // layout.pipeline
    return adapter_parameters(setting.student, setting.config.lora, layout.tensor, layers)


def trained(setting: Setting, held: Count) -> Count:
    """Parameters with gradients and optimizer state, of those (`held`) that a rank has of the model."""
    return Count(adapters_on_rank(setting)) if setting.config.lora.on else held


def trained_on_fullest(setting: Setting) -> Count:
    return trained(setting, largest_rank(setting.student, setting.student_layout))


def backward_products(lora: LoraConfig) -> int:
    """Products of the backward pass with a matrix that stays: frozen ones have no gradient of their own."""
    return 1 if lora.on else WHOLE


def adapter_flops(spec: ModelSpec, lora: LoraConfig, tokens: float) -> float:
    """Of the adapters' own products, forward and backward."""
    return 2 * (1 + WHOLE) * adapter_parameters(spec, lora) * tokens


def kept_change(spec: ModelSpec, lora: LoraConfig, tensor: int, sequence_parallel: bool) -> float:
    """Bytes of a token that a layer with adapters keeps, less those of one whose matrices are trained.

    A x of each adapter is more. A frozen matrix without an adapter does not keep its input; attention and norms keep
    what they have made in any case, which is what proj gets and what qkv's and fc1's inputs come from. (The student's
    first layer keeps nothing of what comes before its first adapter: a plan takes all layers alike.)
    """
    if not lora.on:
        return 0.0
    shared = tensor if sequence_parallel else 1
    inputs = {"linear_qkv": spec.hidden / shared, "linear_fc1": spec.hidden / shared, "linear_fc2": spec.ffn / tensor}
    low = {target: lora.rank / (shared if target in ("linear_proj", "linear_fc2") else 1) for target in lora.targets}
    return 2 * (sum(low.values()) - sum(size for target, size in inputs.items() if target not in lora.targets))


def merging_bytes(setting: Setting) -> float:
    """Bytes of a sync while layers are merged and sent: two buckets, what a rank has merged of one, a matrix in fp32.

    A rank that has the whole model gives its own weights to the engine, and only what is merged goes through buckets.
    """
    layout, lora = setting.student_layout, setting.config.lora
    sizes = [rows * columns / layout.tensor for rows, columns in matrices(setting.student, lora).values()]
    if not sizes:
        return 0.0
    bucket = setting.config.rollout.bucket_mb * 2**20
    merged = sum(sizes) * setting.student.layers / layout.pipeline * setting.weight_bytes
    buckets = min(2 * bucket, merged) if layout.tensor * layout.pipeline == 1 else 2 * bucket
    in_fp32 = 4 * max(sizes) * (2 if setting.weight_bytes < 4 else 1)
    return buckets + min(bucket / layout.tensor, merged) + in_fp32
