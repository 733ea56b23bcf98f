"""Variable-length rows packed end to end: no padding, one micro-batch per token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Rows of prompt + response, one after the other. A response's last token predicts nothing and is left out.

    ids_N, position_N: every token that goes through the model. predicting_M: where in N the positions are that predict
    a response token; sampled_ids_M: the tokens they predict. cu_seqlens: segment bounds in N; cu_responses: in M.
    rows: which rows of the rollout batch these are.
    """

    rows: tuple[int, ...]
    ids_N: Tensor
    position_N: Tensor
    cu_seqlens: Tensor
    predicting_M: Tensor
    sampled_ids_M: Tensor
    cu_responses: Tensor
    longest: int

    def attention_segments(self) -> PackedSeqParams:
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rows: Sequence[int],
    token_budget: int,
    device: torch.device,
) -> list[PackedBatch]:
    """Micro-batches of at most `token_budget` tokens (a longer row stands alone), rows in the order given."""
    batches: list[list[int]] = []
    filled = 0
    for row in rows:
        length = len(prompts[row]) + len(responses[row]) - 1
        if not batches or filled + length > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += length
    return [_pack_rows(prompts, responses, batch, device) for batch in batches]


def _pack_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device
) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    sampled: list[int] = []
    lengths: list[int] = []
    for row in rows:
        prompt, response = list(prompts[row]), list(responses[row])
        length = len(prompt) + len(response) - 1
        predicting += range(len(ids) + len(prompt) - 1, len(ids) + length)
        sampled += response
        ids += (prompt + response)[:length]
        positions += range(length)
        lengths.append(length)

    def int64(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def bounds(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

    return PackedBatch(
        rows=tuple(rows),
        ids_N=int64(ids),
        position_N=int64(positions),
        cu_seqlens=bounds(lengths),
        predicting_M=int64(predicting),
        sampled_ids_M=int64(sampled),
        cu_responses=bounds([len(responses[row]) for row in rows]),
        longest=max(lengths),
    )
