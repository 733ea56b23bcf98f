"""Variable-length rows packed end to end: no padding to the longest, one micro-batch per token budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from prune_opd.loss.context import ContextShard
from prune_opd.rollout.balance import padded_size

DUMMY_ID = 0  # any id of any vocabulary will do


@dataclass(frozen=True)
class PackedBatch:
    """Rows of prompt + response, one after the other. A response's last token predicts nothing and is left out.

    ids_N, position_N: every token that goes through the model. predicting_M: where in N the positions are that predict
    a response token; sampled_ids_M: the tokens they predict. cu_seqlens: segment bounds in N; cu_responses: in M, on
    the host: the loss reads them there, and must not wait for the device.
    rows: which rows of the rollout batch these are. A segment after theirs is one of dummies, that fill N up to a
    multiple: no row attends to them, and they predict nothing.

    Context-parallel ranks have a part of every segment: N and M are then a rank's own tokens, the bounds still those of
    all, and `context` says which of the response tokens M are.

    stale_logp_M: log-probability that a token was sampled with by an older student, NaN at the others; None if all are
    of this step. engine_logp_M: log-probability that the rollout engine gave a token of this step, NaN at stale ones;
    None if it was not asked.
    """

    rows: tuple[int, ...]
    ids_N: Tensor
    position_N: Tensor
    cu_seqlens: Tensor
    predicting_M: Tensor
    sampled_ids_M: Tensor
    cu_responses: Tensor
    longest: int
    stale_logp_M: Tensor | None = None
    engine_logp_M: Tensor | None = None
    context: ContextShard | None = None

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
    context_group: dist.ProcessGroup | None = None,
) -> list[PackedBatch]:
    """Micro-batches of at most `token_budget` tokens (a longer row stands alone), rows in the order given.

    multiple, context_group: as in `pack_rows`; the dummies stay within the budget if it is a multiple itself.
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
    return [pack_rows(prompts, responses, batch, device, multiple, context_group) for batch in batches]


def row_length(prompt: Sequence[int], response: Sequence[int]) -> int:
    """Tokens of a row that go through the model."""
    return len(prompt) + len(response) - 1


def pack_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rows: Sequence[int],
    device: torch.device,
    multiple: int = 1,
    context_group: dist.ProcessGroup | None = None,
    stale_logprobs: Sequence[Sequence[float]] | None = None,
    engine_logprobs: Sequence[Sequence[float]] | None = None,
) -> PackedBatch:
    """These rows as one micro-batch, filled up with dummies to a multiple of `multiple` tokens on each rank.

    Sequence parallelism splits the tokens over the TP ranks, and FP8 matrix products want multiples of 16 on each. No
    rows at all give a micro-batch of dummies, from which nothing is learnt.

    stale_logprobs: of each row's first response tokens, as many as are an older student's. engine_logprobs: of all.
    context_group: ranks that share the tokens. Every row then ends in dummies that make it a multiple of twice their
    number (its last tokens, so that no real one attends to them), and a rank gets its two pieces of it: `zigzag`.
    """
    ranks = 1 if context_group is None else dist.get_world_size(context_group)
    pieces = 1 if context_group is None else 2 * ranks
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    sampled: list[int] = []
    stale: list[float] = []
    engine: list[float] = []
    segments: list[int] = []
    for row in rows:
        prompt, response = list(prompts[row]), list(responses[row])
        length = row_length(prompt, response)
        padded = padded_size(length, pieces)
        predicting += range(len(ids) + len(prompt) - 1, len(ids) + length)
        sampled += response
        if stale_logprobs is not None:
            known = list(stale_logprobs[row])
            stale += known + [math.nan] * (len(response) - len(known))
        if engine_logprobs is not None:
            engine += engine_logprobs[row]
        ids += (prompt + response)[:length] + [DUMMY_ID] * (padded - length)
        positions += range(padded)
        segments.append(padded)
    dummies = padded_size(len(ids), math.lcm(multiple * ranks, pieces)) - len(ids)
    if dummies:
        ids += [DUMMY_ID] * dummies
        positions += range(dummies)
        segments.append(dummies)

    def int64(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def float32(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def bounds(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)

    context = None
    if context_group is not None:
        mine = zigzag(segments, dist.get_rank(context_group), ranks)
        place = {token: i for i, token in enumerate(mine)}  # on this rank
        index = [i for i, token in enumerate(predicting) if token in place]
        context = ContextShard(int64(index), len(predicting), context_group)
        ids, positions = [ids[token] for token in mine], [positions[token] for token in mine]
        predicting, sampled = [place[predicting[i]] for i in index], [sampled[i] for i in index]
        stale, engine = ([part[i] for i in index] if part else [] for part in (stale, engine))
    return PackedBatch(
        rows=tuple(rows),
        ids_N=int64(ids),
        position_N=int64(positions),
        cu_seqlens=bounds(segments).to(device),
        predicting_M=int64(predicting),
        sampled_ids_M=int64(sampled),
        cu_responses=bounds([len(responses[row]) for row in rows]),
        longest=max(segments),
        stale_logp_M=None if stale_logprobs is None else float32(stale),
        engine_logp_M=None if engine_logprobs is None else float32(engine),
        context=context,
    )


def zigzag(segments: Sequence[int], rank: int, ranks: int) -> list[int]:
    """The tokens of a context-parallel rank: of each segment one piece from the front and one from the back.

    A segment of a multiple of 2 · ranks tokens is cut into as many pieces. An early piece is cheap in causal attention
    and a late one dear: rank r gets pieces r and 2 · ranks − 1 − r, which is what Transformer Engine expects.
    """
    tokens: list[int] = []
    for begin, end in pairwise(accumulate(segments, initial=0)):
        piece = (end - begin) // (2 * ranks)
        for number in (rank, 2 * ranks - 1 - rank):
            tokens += range(begin + number * piece, begin + (number + 1) * piece)
    return tokens
