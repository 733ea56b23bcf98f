"""Variable-length rows packed end to end: no padding to the longest, one micro-batch per token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from prune_opd.dealing import padded_size

DUMMY_ID = 0  # any id of any vocabulary will do


@dataclass(frozen=True)
class PackedBatch:
    """Rows of prompt + response, one after the other. A response's last token predicts nothing and is left out.

    ids_N, position_N: every token that goes through the model. predicting_M: where in N the positions are that predict
    a response token; sampled_ids_M: the tokens they predict. cu_seqlens: segment bounds in N; cu_responses: in M.
    rows: which rows of the rollout batch these are. A segment after theirs is one of dummies, that fill N up to a
    multiple: no row attends to them, and they predict nothing.
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
        """What megatron-core hands to rotary embeddings and core attention, ours and Transformer Engine's alike.

        The dummies are a segment like any other, so `cu_seqlens_*_padded` stay None: Transformer Engine then knows that
        nothing lies between the segments and may use flash attention, which does not take such gaps.
        """
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
    multiple: int = 1,
) -> list[PackedBatch]:
    """Micro-batches of at most `token_budget` tokens (a longer row stands alone), rows in the order given.

    multiple: as in `pack_rows`; the dummies stay within the budget if it is a multiple itself.
    """
    batches: list[list[int]] = []
    filled = 0
    for row in rows:
        length = row_length(prompts[row], responses[row])
        if not batches or filled + length > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += length
    return [pack_rows(prompts, responses, batch, device, multiple) for batch in batches]


def row_length(prompt: Sequence[int], response: Sequence[int]) -> int:
    """Tokens of a row that go through the model."""
    return len(prompt) + len(response) - 1


def pack_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rows: Sequence[int],
    device: torch.device,
    multiple: int = 1,
) -> PackedBatch:
    """These rows as one micro-batch, filled up with dummies to a multiple of `multiple` tokens.

    Sequence parallelism splits the tokens over the TP ranks, and FP8 matrix products want multiples of 16 on each. No
    rows at all give a micro-batch of dummies, from which nothing is learnt.
    """
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    sampled: list[int] = []
    segments: list[int] = []
    for row in rows:
        prompt, response = list(prompts[row]), list(responses[row])
        length = row_length(prompt, response)
        predicting += range(len(ids) + len(prompt) - 1, len(ids) + length)
        sampled += response
        ids += (prompt + response)[:length]
        positions += range(length)
        segments.append(length)
    dummies = padded_size(len(ids), multiple) - len(ids)
    if dummies:
        ids += [DUMMY_ID] * dummies
        positions += range(dummies)
        segments.append(dummies)

    def int64(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def bounds(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

    return PackedBatch(
        rows=tuple(rows),
        ids_N=int64(ids),
        position_N=int64(positions),
        cu_seqlens=bounds(segments),
        predicting_M=int64(predicting),
        sampled_ids_M=int64(sampled),
        cu_responses=bounds([len(responses[row]) for row in rows]),
        longest=max(segments),
    )
