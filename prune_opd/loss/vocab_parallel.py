"""Log-normaliser and top-k over a vocabulary that is split among the ranks of a tensor-parallel group.

Rank r of the group holds the logits of the global token ids r · rows … (r + 1) · rows − 1, where `rows` is the height
of its output-weight shard; the last ids may be padding. `group` is None on a single rank. Nothing here has a gradient:
the fused loss forms its own (loss/distill.py). What looks like a detail but is not:

- A result that every rank needs is the same on every rank, bit for bit, or the ranks' gates would come apart.
- Ties in a top-k go to the lower token id, so that a support does not change with the size of the group.
- Every collective works on a contiguous tensor: gloo delivers wrong data, without an error, on others.
- Small results travel together: a chunk of the loss costs one gather (`topk_together`) and one sum (`sum_together`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.errors import ConfigError
from prune_opd.loss.products import logits_

# Candidates taken beyond k, so that short ties at the k-th place (bf16 logits have many) are settled among them.
TIE_MARGIN = 16


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
    """The k largest logits of every token, largest first, equal ones by id: values and global ids (int64), [N, k]."""

    values_NK: Tensor
    ids_NK: Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None else 1


def mask_padding_(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """Set the logits of padding (global id ≥ vocab_size) to −inf, in place: probability 0, never in a top-k."""
    if shard.valid < shard.rows:
        logits_NV[:, shard.valid :] = float("-inf")
    return logits_NV


class OutputHead:
    """One model's hidden states and output weight on this rank, and the buffer its logits are written to."""

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
        """This rank's logits of some tokens, over temperature, padding at −inf; good until the next call."""
        hidden_CH = self.hidden_NH[part]
        logits_CV = self._logits_CV[: len(hidden_CH)]
        logits_(hidden_CH, self.weight_VH, logits_CV)
        if self.temperature != 1:
            logits_CV /= self.temperature
        return mask_padding_(logits_CV, self.shard)


# ---------------------------------------------------------------------------------------------------- on one rank


def local_topk(logits_NV: Tensor, k: int) -> TopK:
    """Exact top-k of this rank's columns, ties to the lower column; the ids are columns. All columns if fewer than k.

    `torch.topk` picks any of the tied entries at the k-th place. With a few candidates more than k a tie is settled
    among them; rows whose tie runs on past the last candidate (constant logits, say) are sorted whole. To know
    whether there are any, the host has to wait.
    """
    columns = logits_NV.shape[1]
    k = min(k, columns)
    values_NC, ids_NC = logits_NV.topk(min(k + TIE_MARGIN, columns), dim=-1)
    if values_NC.shape[1] < columns:
        last_N = values_NC[:, -1]
        undecided_N = (values_NC[:, k - 1] == last_N) & (last_N > float("-inf"))
        for row in undecided_N.nonzero().flatten().tolist():
            by_value = logits_NV[row].sort(descending=True, stable=True)
            values_NC[row], ids_NC[row] = by_value.values[: len(values_NC[row])], by_value.indices[: len(ids_NC[row])]
    ids_NC, by_id_NC = ids_NC.sort(dim=-1)
    values_NC, by_value_NC = values_NC.gather(1, by_id_NC).sort(dim=-1, descending=True, stable=True)
    return TopK(values_NC[:, :k], ids_NC.gather(1, by_value_NC)[:, :k])


def local_gather(logits_NV: Tensor, ids_NK: Tensor, shard: VocabShard) -> Tensor:
    """Logits at global ids [N, K], 0 where another rank has the id: the sum over the group is the whole answer."""
    column_NK, mine_NK = local_columns(ids_NK, shard)
    return logits_NV.gather(1, column_NK).masked_fill(~mine_NK, 0)


def local_columns(ids_NK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Columns of global ids on this rank, and whether they are here at all; the column is 0 where they are not."""
    column_NK = ids_NK - shard.first
    mine_NK = (column_NK >= 0) & (column_NK < shard.rows)
    return column_NK.masked_fill(~mine_NK, 0), mine_NK


# ---------------------------------------------------------------------------------------------------- over the group


def sum_together(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sums over the group of several [N, ·] tensors of one dtype, in one all-reduce."""
    if group_size(group) == 1:
        return list(parts)
    packed = torch.cat(list(parts), dim=1).contiguous()
    dist.all_reduce(packed, group=group)
    return list(packed.split([part.shape[1] for part in parts], dim=1))


def topk_together(logits: Sequence[Tensor], k: int, shards: Sequence[VocabShard]) -> list[TopK]:
    """Exact top-k, over the whole vocabulary, of several models' logits for the same N tokens, in one all-gather.

    logits: one [N, rows] a model, of one dtype, padding at −inf. shards: in that order, of one group. k ≤ vocab_size.
    """
    group = shards[0].group
    candidates = [local_topk(logits_NV, k) for logits_NV in logits]
    if group_size(group) == 1:
        return candidates
    # Columns are exact as floats: a shard has fewer than 2^24 rows.
    local = torch.cat([part for c in candidates for part in (c.values_NK, c.ids_NK.to(c.values_NK.dtype))], dim=1)
    gathered_RNC = local.new_empty(group_size(group), *local.shape)
    dist.all_gather(list(gathered_RNC.unbind(0)), local.contiguous(), group=group)
    merged, taken = [], 0
    for candidate, shard in zip(candidates, shards, strict=True):
        width = candidate.values_NK.shape[1]
        values_RNK = gathered_RNC[:, :, taken : taken + width]
        ids_RNK = gathered_RNC[:, :, taken + width : taken + 2 * width].long()
        ids_RNK += shard.rows * torch.arange(len(ids_RNK), device=ids_RNK.device)[:, None, None]
        taken += 2 * width
        # In shard order, equal values stand in the order of their ids, and a stable sort leaves them so.
        values_NC, ids_NC = (part.transpose(0, 1).flatten(1) for part in (values_RNK, ids_RNK))
        values_NC, order_NC = values_NC.sort(dim=-1, descending=True, stable=True)
        merged.append(TopK(values_NC[:, :k], ids_NC.gather(1, order_NC)[:, :k]))
    return merged


def topk(logits_NV: Tensor, k: int, shard: VocabShard) -> TopK:
    """Exact top-k of every token over the whole vocabulary, ties to the lower token id at every group size."""
    return topk_together([logits_NV], k, [shard])[0]


def log_normaliser(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """log Σ_v exp(logit_v) over the whole vocabulary [N], in fp32 (fp64 for fp64 logits), complete on every rank."""
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    maximum_N1 = logits_NV.amax(dim=-1, keepdim=True).contiguous()
    if group_size(shard.group) > 1:
        dist.all_reduce(maximum_N1, op=dist.ReduceOp.MAX, group=shard.group)
    (total_N1,) = sum_together([(logits_NV - maximum_N1).exp_().sum(dim=-1, keepdim=True)], shard.group)
    return (maximum_N1 + total_N1.log()).squeeze(1)
