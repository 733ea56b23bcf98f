"""Parameters and operations are those that were published for the models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prune_opd.model_spec import ModelSpec, published
from prune_opd.plan.counts import (
    ParallelSizes,
    active_parameters,
    cache_bytes,
    flops_by_length,
    on_rank,
    parameters,
    touched_parameters,
)

# Parameters in billions (model cards; arXiv 2505.09388). The cards of the R1-Distill models say 1.5B and 7B; these are
# the numbers of their files, whose heads are not tied.
PUBLISHED = {
    "Qwen/Qwen3-1.7B-Base": 1.72,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-32B": 32.8,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-235B-A22B": 235.0,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62,
}


def spec(name: str) -> ModelSpec:
    return ModelSpec.of(published()[name], name)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert parameters(spec(name)) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(("name", "billions"), [("Qwen/Qwen3-30B-A3B", 3.3), ("Qwen/Qwen3-235B-A22B", 22.0)])
def test_active_parameters_are_the_published_ones(name: str, billions: float) -> None:
    embedding = spec(name).vocab_size * spec(name).hidden  # counted as active there; no product is made with it
    assert (active_parameters(spec(name)) + embedding) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", published())
def test_the_ranks_of_a_layout_hold_the_whole_model(name: str) -> None:
    model = spec(name)
    layout = ParallelSizes(tensor=2, pipeline=2, expert=2)
    held = [on_rank(model, layout, stage) for stage in range(2)]
    replicated = 2 * model.layers * model.hidden + model.hidden  # norms, on every TP rank
    replicated += model.layers * 2 * model.head_dim * model.qk_norm
    replicated += model.layers * model.hidden * model.moe.experts if model.moe else 0
    padding = (model.padded_vocab(2) - model.vocab_size) * model.hidden * 2
    second_copy = model.padded_vocab(2) * model.hidden - padding // 2 if model.tied else 0
    expected = parameters(model) + replicated + padding + second_copy
    assert 2 * sum(count.all for count in held) == expected


def test_flops_are_two_per_parameter_and_the_attention() -> None:
    model = spec("Qwen/Qwen3-8B")
    assert flops_by_length(model)(1) == pytest.approx(2 * active_parameters(model), rel=1e-3)
    short, long = (flops_by_length(model)(length) / length for length in (1000, 10000))
    assert long - short == pytest.approx(2 * 36 * 32 * 128 * 9000)


def test_a_token_of_qwen3_8b_takes_144_kib_of_cache() -> None:
    assert cache_bytes(spec("Qwen/Qwen3-8B"), 2) == 144 * 1024
    assert cache_bytes(spec("Qwen/Qwen3-8B"), 2, tensor=8) == 18 * 1024
    assert cache_bytes(spec("Qwen/Qwen3-8B"), 1, tensor=16) == 9 * 1024  # heads are repeated, not cut


@pytest.mark.parametrize("name", published())
def test_a_token_takes_as_much_cache_as_vllm_says(name: str) -> None:
    """Against vLLM's own page size, in bf16 and FP8, for every number of ranks that it divides the heads over."""
    import torch
    from vllm.config import ModelConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    model = spec(name)
    heads_of = SimpleNamespace(use_mla=False, model_arch_config=SimpleNamespace(total_num_kv_heads=model.kv_heads))
    for ranks in (1, 2, 4, 8, 16):
        if model.kv_heads % ranks and ranks % model.kv_heads:
            continue  # the preflight refuses it
        heads = ModelConfig.get_num_kv_heads(heads_of, SimpleNamespace(tensor_parallel_size=ranks))
        for dtype, size in ((torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
            page = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=model.head_dim, dtype=dtype)
            assert cache_bytes(model, size, ranks) == model.layers * page.page_size_bytes / 16


def test_a_large_batch_touches_all_experts_and_one_token_only_its_own() -> None:
    model = spec("Qwen/Qwen3-30B-A3B")
    assert touched_parameters(model, 1) == pytest.approx(active_parameters(model))
    everything = parameters(model) - model.vocab_size * model.hidden  # without the embedding
    assert touched_parameters(model, 500) == pytest.approx(everything, rel=0.01)
