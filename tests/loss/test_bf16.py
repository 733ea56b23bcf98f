"""bf16 inputs: gradients of a converged, sharp pair keep their digits, and no weight is copied whole to fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig, WeightingConfig
from prune_opd.loss import products, vocab_parallel
from tests.peak import peak_bytes
from tests.sharp import SHARP_CASES, SHARP_TOLERANCE, gradients, sharp_case


def rounded_logits(hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> Tensor:
    """The usual mistake: the product is rounded to bf16 before it is copied into the fp32 buffer."""
    return out_CV.copy_(hidden_CH @ weight_VH.t())


@pytest.mark.parametrize(("objective", "weighting"), SHARP_CASES.values(), ids=SHARP_CASES)
def test_a_gradient_in_bf16_is_that_of_float64_on_the_same_inputs_and_with_rounded_logits_it_is_not(
    objective: ObjectiveConfig, weighting: WeightingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = sharp_case()
    expected = gradients(case, objective, weighting, torch.float64)
    assert max(gradients(case, objective, weighting).error(expected)) <= SHARP_TOLERANCE
    monkeypatch.setattr(vocab_parallel, "logits_", rounded_logits)
    # The least is a price outside the top-k, which does not vanish as the models converge.
    assert min(gradients(case, objective, weighting).error(expected)) > 5 * SHARP_TOLERANCE


@pytest.mark.parametrize("block", [products.BLOCK, 10 * 64])  # all 1024 rows of 64 numbers; 10 rows, the last 4
def test_a_product_in_blocks_is_the_whole_product(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", block)
    case = sharp_case()
    hidden_NH, weight_VH = case.student_hidden, case.student_weight
    logits_NV = products.logits_(hidden_NH, weight_VH, torch.empty(len(hidden_NH), len(weight_VH)))
    torch.testing.assert_close(logits_NV, hidden_NH.float() @ weight_VH.float().t(), rtol=1e-5, atol=1e-5)
    grad_NH = torch.empty(hidden_NH.shape)
    products.hidden_gradient_(logits_NV, weight_VH, grad_NH, torch.float32)
    torch.testing.assert_close(grad_NH, logits_NV @ weight_VH.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [products.WEIGHT_ROWS, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_is_added_to_a_buffer_of_either_dtype(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WEIGHT_ROWS", rows)
    grad_NV, hidden_NH = torch.randn(40, 1024), torch.randn(40, 64).bfloat16()
    buffer = torch.ones(1024, 64, dtype=dtype)
    products.add_weight_gradient_(buffer, grad_NV, hidden_NH, torch.float32)
    torch.testing.assert_close(buffer, (1 + grad_NV.t() @ hidden_NH.float()).to(dtype))


@pytest.mark.parametrize("name", ["topk_reverse_kl", "full_vocab_reverse_kl"])
def test_a_weight_is_cast_up_a_block_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 16 * 512)
    case = sharp_case(tokens=12, hidden=512).leaves(torch.bfloat16)
    weight_bytes = 4 * 1024 * 512  # one of the two in fp32
    buffer = torch.zeros(1024, 512)

    def run() -> None:
        case.fused(objective=ObjectiveConfig(name, k=6), chunk=6, weight_grad=buffer)[0].backward()

    run()  # what torch keeps for later calls is there now
    assert peak_bytes(run) < weight_bytes / 4
    monkeypatch.setattr(products, "BLOCK", 1024 * 512)
    assert peak_bytes(run) > weight_bytes  # or the first number would say nothing


# ---------------------------------------------------------------------------------------------------- CUDA's products


def stand_in(name: str) -> Callable[..., Tensor]:
    """torch.mm or torch.addmm as CUDA has it: bf16 in, sums in fp32, the result in `out_dtype` or rounded to bf16.

    The CPU has no such kernel. Like CUDA's, it takes no `out` of another dtype than the result's. Inputs wider than
    bf16 are multiplied as they are.
    """
    plain = getattr(torch, name)
    schemas = {schema.overload_name for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")}
    assert {"dtype", "dtype_out"} <= schemas  # this torch knows the call

    def product(*inputs: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        *added, left, right = inputs
        if out_dtype is None and left.dtype != torch.bfloat16:
            return plain(*inputs, out=out)
        out_dtype = out_dtype or torch.bfloat16
        assert left.dtype == right.dtype == torch.bfloat16 and all(part.dtype == out_dtype for part in added)
        result: Tensor = plain(*(part.float() for part in inputs)).to(out_dtype)
        assert out is None or out.dtype == out_dtype
        return result if out is None else out.copy_(result)

    return product


@pytest.mark.parametrize("name", ["topk_reverse_kl", "sampled_token", "full_vocab_reverse_kl"])
@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
def test_the_path_of_cuda_has_the_same_gradients(
    name: str, buffer_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls, through a stand-in: the kernels themselves run on a GPU only."""
    case, objective = sharp_case(), ObjectiveConfig(name, k=6)
    expected = gradients(case, objective, WeightingConfig(), torch.float64)
    plain, counted = products._on_tensor_cores, []

    def on_tensor_cores(inputs: Tensor, dtype: torch.dtype) -> bool:
        assert not plain(inputs, dtype)
        counted.append(inputs.dtype)
        return inputs.dtype == torch.bfloat16 and dtype == torch.float32

    for operator in ("mm", "addmm"):
        monkeypatch.setattr(products.torch, operator, stand_in(operator))
    monkeypatch.setattr(products, "_on_tensor_cores", on_tensor_cores)
    got = gradients(case, objective, WeightingConfig(), buffer_dtype=buffer_dtype)
    assert counted and max(got.error(expected)) <= SHARP_TOLERANCE
