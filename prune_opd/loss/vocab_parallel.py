"""Log-normaliser and top-k over a vocabulary that is split among the ranks of a tensor-parallel group.

Rank r of the group holds the logits of the global token ids r · rows … (r + 1) · rows − 1, where `rows` is the height
of its output-weight shard; the last ids may be padding. `group` is None on a single rank. Nothing here has a gradient:
the fused loss forms its own (loss/distill.py). What looks like a detail but is not:

- A result that every rank needs is the same on every rank, bit for bit, or the ranks' gates would come apart.
- Ties in a top-k go to the lower token id, so that a support does not change with the size of the group.
- Every collective works on a contiguous tensor: gloo delivers wrong data, without an error, on others.
- Small results travel together: a chunk of the loss costs one gather (`topk_together`) and one sum (`sum_together`).
- Both models' logits are in one buffer (`both_logits`), so that what is done to both is done at once.
- The host never waits for a result: no step depends on what the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.errors import ConfigError
from prune_opd.loss.products import logits_

# The logit of what is not there: exp is exactly 0, and 0 times it is 0 (0 · −inf is not a number).
NOTHING = -1e30
BLOCK = 64  # columns of which the maximum is taken first in a top-k; rows of a buffer of logits are multiples of it


@dataclass(frozen=True)
class VocabShard:
    """Where this rank's rows of one model's output weight lie. Student and teacher may be padded differently."""

    rows: int
    vocab_size: int  # token ids that exist; global ids from here on are padding
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> int:
        """Global id of this rank's first row."""
        return self.rows * (dist.get_rank(self.group) if self.group is not None else 0)

    @property
    def valid(self) -> int:
        """How many of this rank's rows are real token ids."""
        return min(max(self.vocab_size - self.first, 0), self.rows)


class TopK(NamedTuple):
    """The k largest logits of every token, largest first, equal ones by id: values and global ids (int64), [..., k]."""

    values_NK: Tensor
    ids_NK: Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None else 1


def mask_padding_(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """Set the logits of padding (global id ≥ vocab_size) to `NOTHING`, in place: probability 0, never in a top-k."""
    if shard.valid < logits_NV.shape[1]:
        logits_NV[:, shard.valid :] = NOTHING
    return logits_NV


class OutputHead:
    """One model's hidden states and output weight on this rank, and the buffer its logits are written to.

    whole: whether its logits are known at every id (loss/known_top.py has one that are not).
    """

    whole = True

    def __init__(
        self,
        name: str,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        temperature: float,
        vocab_size: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        for part, tensor in (("hidden", hidden_NH), ("weight", weight_VH)):
            if tensor.ndim != 2 or not tensor.is_floating_point():
                raise ValueError(
                    f"{name}_{part} is {tensor.dtype} {list(tensor.shape)}: a floating-point matrix is needed, "
                    f"[{'tokens' if part == 'hidden' else 'vocabulary'}, hidden size]"
                )
        if hidden_NH.shape[1] != weight_VH.shape[1] or hidden_NH.dtype != weight_VH.dtype:
            raise ValueError(
                f"{name}_hidden {hidden_NH.dtype} {list(hidden_NH.shape)} does not fit {name}_weight {weight_VH.dtype} "
                f"{list(weight_VH.shape)}: hidden size and dtype must agree"
            )
        rows, ranks = weight_VH.shape[0], group_size(group)
        if vocab_size < 1 or rows * ranks < vocab_size:
            raise ConfigError(
                f"vocab_size = {vocab_size} does not fit {name}_weight: {rows} rows × {ranks} tensor-parallel ranks = "
                f"{rows * ranks}; give a vocabulary of 1..{rows * ranks}, or the (padded) weight it needs"
            )
        self.name = name
        self.hidden_NH = hidden_NH.detach()
        self.weight_VH = weight_VH.detach()
        self.dtype = weight_VH.dtype
        self.temperature = temperature
        self.shard = VocabShard(rows, vocab_size, group)

    def align(self, rows: int) -> None:
        """Exchange rows over the group until every rank has `rows` of them, as another model's shards have.

        With 151936 token ids the shards of a weight padded to 152064 start elsewhere than those of one that is not:
        what compares both models column by column needs the same ids on a rank. Padding stays behind, as zeros.
        """
        group, ranks = self.shard.group, group_size(self.shard.group)
        if ranks == 1 or rows == self.shard.rows:
            return
        old, rank = self.shard, dist.get_rank(self.shard.group)

        def shared(holder: int, taker: int) -> int:
            first, last = max(holder * old.rows, taker * rows), min((holder + 1) * old.rows, (taker + 1) * rows)
            return max(min(last, old.vocab_size) - first, 0)

        received = [shared(other, rank) for other in range(ranks)]
        weight_VH = self.weight_VH.new_zeros(rows, self.weight_VH.shape[1])
        arrived_VH = self.weight_VH.new_empty(sum(received), self.weight_VH.shape[1])
        sent = [shared(rank, other) for other in range(ranks)]
        dist.all_to_all_single(arrived_VH, self.weight_VH[: old.valid].contiguous(), received, sent, group=group)
        weight_VH[: len(arrived_VH)] = arrived_VH
        self.weight_VH, self.shard = weight_VH, VocabShard(rows, old.vocab_size, group)

    def allocate(self, tokens: int, dtype: torch.dtype) -> None:
        """One buffer for every chunk: fresh memory for each would cost the CPU as much as a pass over the logits."""
        self._logits_CV = self.weight_VH.new_empty(tokens, self.shard.rows, dtype=dtype)

    def logits(self, part: slice) -> Tensor:
        """This rank's logits of some tokens, over temperature, padding at `NOTHING`; good until the next call."""
        return self.logits_(part, self._logits_CV[: len(self.hidden_NH[part])])

    def logits_(self, part: slice, out_NW: Tensor) -> Tensor:
        """The same into `out_NW`, at least as wide as the shard has rows; what is wider is padding too."""
        logits_NV = out_NW[:, : self.shard.rows]
        logits_(self.hidden_NH[part], self.weight_VH, logits_NV)
        if self.temperature != 1:
            logits_NV /= self.temperature
        return mask_padding_(out_NW, self.shard)


class BothLogits:
    """The buffer for both models' logits of a chunk, [2, C, W], the student's first, and as much again for scratch.

    W: the rows of the larger shard, rounded up to a multiple of `BLOCK`. On a CPU the scratch memory is for the few
    rows at a time that its cache holds (`row_blocks`); elsewhere for the whole chunk. scratch: whether there is any.
    """

    def __init__(
        self, student: OutputHead, teacher: OutputHead, tokens: int, dtype: torch.dtype, scratch: bool = True
    ) -> None:
        self.heads, self.dtype = (student, teacher), dtype
        self.shards = (student.shard, teacher.shard)
        width = -(-max(shard.rows for shard in self.shards) // BLOCK) * BLOCK
        self._logits_2CW = student.weight_VH.new_empty(2, tokens, width, dtype=dtype)
        rows = max((part.stop - part.start for part in row_blocks(self._logits_2CW)), default=0)
        self.scratch_2RW = self._logits_2CW.new_empty(2, rows if scratch else 0, width)

    def of(self, part: slice) -> Tensor:
        """Both models' logits of some tokens [2, N, W]; good until the next call."""
        logits_2NW = self._logits_2CW[:, : len(self.heads[0].hidden_NH[part])]
        for head, logits_NW in zip(self.heads, logits_2NW, strict=True):
            head.logits_(part, logits_NW)
        return logits_2NW


CACHED = 1 << 18  # logits of a model that are worked on at a time on a CPU, or one row
TOPK_PARTS = 8  # that a chunk's tokens are cut into for a top-k on a CPU: its candidates take a part of the memory


def row_blocks(logits_2NW: Tensor, on_device: int = 1) -> list[slice]:
    """A few rows at a time on a CPU, whose cache holds them from one step to the next; elsewhere `on_device` parts."""
    _, rows, width = logits_2NW.shape
    few = max(-(-rows // 64), CACHED // width)
    step = max(few if logits_2NW.device.type == "cpu" else -(-rows // on_device), 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


# ---------------------------------------------------------------------------------------------------- on one rank


def local_topk(logits_NV: Tensor, k: int, maxima_NB: Tensor | None = None) -> TopK:
    """Exact top-k of this rank's columns, ties to the lower column; the ids are columns. All columns if fewer than k.

    logits_NV: [..., V] with fewer than 2^20 columns, finite but for −inf at fewer than V − k of them. In a wide matrix
    the maxima of blocks of columns are taken first, one pass, and all the rest is done in the k blocks that hold the
    largest: k blocks with larger maxima, or with equal ones at lower ids, have k elements that come before any other.
    maxima_NB: of the blocks, where they are known.
    """
    columns, rows = logits_NV.shape[-1], logits_NV.shape[-2]
    k = min(k, columns)
    if logits_NV.device.type == "cpu" and logits_NV.numel() > CACHED and rows > TOPK_PARTS:
        step = -(-rows // TOPK_PARTS)
        maxima = [None] * TOPK_PARTS if maxima_NB is None else maxima_NB.split(step, dim=-2)
        parts = [local_topk(part_RV, k, of) for part_RV, of in zip(logits_NV.split(step, dim=-2), maxima, strict=False)]
        return TopK(*(torch.cat(part, dim=-2) for part in zip(*parts, strict=True)))
    if columns % BLOCK or columns < (4 if maxima_NB is None else 1) * k * BLOCK:
        ids_NC = torch.arange(columns, device=logits_NV.device).expand(logits_NV.shape)
        values_NC = logits_NV
    else:
        if maxima_NB is None:
            maxima_NB = logits_NV.unflatten(-1, (-1, BLOCK)).amax(dim=-1)
        block_NK = _largest(maxima_NB, torch.arange(maxima_NB.shape[-1], device=logits_NV.device), k)
        within_B = torch.arange(BLOCK, device=logits_NV.device)
        ids_NC = torch.add(within_B, block_NK.unsqueeze(-1), alpha=BLOCK).flatten(-2)
        values_NC = logits_NV.gather(-1, ids_NC)
    place_NK = _largest(values_NC, ids_NC, k)
    # Equal values stand in the order of their ids, and a stable sort leaves them so.
    values_NK, order_NK = values_NC.gather(-1, place_NK).sort(dim=-1, descending=True, stable=True)
    return TopK(values_NK, ids_NC.gather(-1, place_NK).gather(-1, order_NK))


def _largest(values_NC: Tensor, ids_NC: Tensor, k: int) -> Tensor:
    """Places of the k largest of [..., C], of equal ones those with the lowest ids [C] or [..., C], in no fixed order
    but that equal ones stand in the order of their ids.

    `torch.topk` takes any of the equal values at the k-th place. So it is only asked which value that is; a second one
    picks among numbers that all differ: 1 for what is above it, 0 for what is equal, −1 below, less a part of the id.
    """
    least_N1 = values_NC.topk(k, dim=-1).values[..., -1:]
    rank_NC = (values_NC - least_N1).sign_()
    return torch.sub(rank_NC, ids_NC, alpha=2.0**-20).topk(k, dim=-1).indices


def local_gather(logits_NV: Tensor, ids_NK: Tensor, shard: VocabShard) -> Tensor:
    """Logits at global ids [N, K], 0 where another rank has the id: the sum over the group is the whole answer."""
    return gather_both(logits_NV.unsqueeze(0), ids_NK, [shard])[0]


def gather_both(logits_MNV: Tensor, ids_NK: Tensor, shards: Sequence[VocabShard]) -> Tensor:
    """`local_gather` of several models' logits at once, [models, N, K]."""
    column_MNK, mine_MNK = columns_of_both(ids_NK, shards)
    at_MNK = logits_MNV.gather(2, column_MNK)
    return at_MNK if mine_MNK is None else at_MNK.mul_(mine_MNK)


def columns_of_both(ids_NK: Tensor, shards: Sequence[VocabShard]) -> tuple[Tensor, Tensor | None]:
    """`local_columns` of each shard, [models, N, K]."""
    shape = (len(shards), *ids_NK.shape)
    if len({(shard.first, shard.rows) for shard in shards}) == 1:
        column_NK, mine_NK = local_columns(ids_NK, shards[0])
        return column_NK.expand(shape), None if mine_NK is None else mine_NK.expand(shape)
    columns, mine = zip(*(local_columns(ids_NK, shard) for shard in shards), strict=True)
    return torch.stack(columns), None if mine[0] is None else torch.stack(mine)


def local_columns(ids_NK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor | None]:
    """Columns of global ids on this rank, and whether they are here at all (None: all are); else some other column."""
    if group_size(shard.group) == 1:
        return ids_NK, None
    column_NK = ids_NK - shard.first
    inside_NK = column_NK.clamp(0, shard.rows - 1)
    return inside_NK, column_NK == inside_NK


# ---------------------------------------------------------------------------------------------------- over the group


def sum_together(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sums over the group of several tensors of one dtype, in one all-reduce."""
    if group_size(group) == 1:
        return list(parts)
    packed = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(packed, group=group)
    return [
        whole.view(part.shape)
        for whole, part in zip(packed.split([part.numel() for part in parts]), parts, strict=True)
    ]


def topk_together(logits_MNV: Tensor, k: int, shards: Sequence[VocabShard], maxima_MNB: Tensor | None = None) -> TopK:
    """Exact top-k of several models' logits for the same N tokens over the whole vocabulary, in one all-gather.

    logits_MNV: [models, N, columns], padding at `NOTHING`. shards: in that order, of one group. k ≤ vocab_size.
    maxima_MNB: of blocks of columns, where they are known.
    """
    group, ranks = shards[0].group, group_size(shards[0].group)
    values_MNK, ids_MNK = local_topk(logits_MNV, k, maxima_MNB)
    if ranks == 1:
        return TopK(values_MNK, ids_MNK)
    first = [shard.first for shard in shards]
    if len(set(first)) == 1:
        ids_MNK = ids_MNK + first[0]
    else:
        ids_MNK = torch.stack([ids_NK + begin for ids_NK, begin in zip(ids_MNK, first, strict=True)])
    # Ids are exact as floats: a vocabulary has fewer than 2^24 of them.
    local_2MNK = torch.stack([values_MNK, ids_MNK.to(values_MNK.dtype)])
    gathered = local_2MNK.new_empty(2 * ranks, *local_2MNK.shape[1:])
    dist.all_gather_into_tensor(gathered, local_2MNK, group=group)
    # In shard order, equal values stand in the order of their ids, and a stable sort leaves them so.
    values_MNC, ids_MNC = gathered.unflatten(0, (ranks, 2)).permute(1, 2, 3, 0, 4).flatten(3)
    values_MNC, order_MNC = values_MNC.sort(dim=-1, descending=True, stable=True)
    return TopK(values_MNC[..., :k], ids_MNC.gather(-1, order_MNC[..., :k]).long())


def topk(logits_NV: Tensor, k: int, shard: VocabShard) -> TopK:
    """Exact top-k of every token over the whole vocabulary, ties to the lower token id at every group size."""
    values_1NK, ids_1NK = topk_together(logits_NV.unsqueeze(0), k, [shard])
    return TopK(values_1NK[0], ids_1NK[0])


def log_normaliser(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """log Σ_v exp(logit_v) over the whole vocabulary [N], in fp32 (fp64 for fp64 logits), complete on every rank."""
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    maximum_N1 = logits_NV.amax(dim=-1, keepdim=True).contiguous()
    if group_size(shard.group) > 1:
        dist.all_reduce(maximum_N1, op=dist.ReduceOp.MAX, group=shard.group)
    (total_N1,) = sum_together([(logits_NV - maximum_N1).exp_().sum(dim=-1, keepdim=True)], shard.group)
    return (maximum_N1 + total_N1.log()).squeeze(1)


def least_logit(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """The least logit over the whole vocabulary [N], without padding, complete on every rank."""
    least_N = logits_NV.masked_fill(logits_NV <= NOTHING, math.inf).amin(dim=-1).contiguous()
    if group_size(shard.group) > 1:
        dist.all_reduce(least_N, op=dist.ReduceOp.MIN, group=shard.group)
    return least_N
