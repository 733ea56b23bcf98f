"""A teacher of which only its best ids are known, and the sampled one: what a server tells (elsewhere/client.py).

The loss is made of both models' logits. Such a teacher gets some: log q at the ids that are known, and what is left of
its mass evenly on all others. Their exponentials sum to 1, so that a log-probability comes out as it was told, and no
other id is above the least of the best ones. So the sampled token, the teacher's top-k and its nucleus are what they
are, and all that is made of them. The rest beside a set of its best ids is 1 less theirs; where that is but rounding,
the known ones in it and a bound of the others: for a bucket `check_teacher_server` asks for as many ids again.

What is not: its log-probability of another id, and every sum over its vocabulary. `check_teacher_server`
(config/elsewhere.py) refuses the settings that need these, and the statistics have NaN in their place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.loss.vocab_parallel import OutputHead, VocabShard, local_columns, mask_padding_


class KnownTop(NamedTuple):
    """In place of a teacher's `Head`: log q over its whole vocabulary, at temperature 1, at K ids of each token."""

    ids_NK: Tensor  # its best ids, each once; an id that is not in the vocabulary (−1) stands for none
    logp_NK: Tensor  # at least fp32
    sampled_logp_N: Tensor  # log q(y_t), whether or not it is among them


class KnownTopHead(OutputHead):
    """The teacher's head, without a matrix. rows: this rank's part of the vocabulary, the student's."""

    whole = False

    def __init__(
        self, known: KnownTop, sampled_ids_N: Tensor, rows: int, vocab_size: int, group: dist.ProcessGroup | None
    ) -> None:
        tokens = len(known.ids_NK)
        if tokens != len(sampled_ids_N):
            raise ValueError(
                f"the teacher's best ids are of {tokens} tokens and sampled_ids of {len(sampled_ids_N)}: both models "
                "must have seen the same packed response tokens"
            )
        if known.logp_NK.shape != known.ids_NK.shape or known.sampled_logp_N.shape != (tokens,):
            raise ValueError(
                f"the teacher's ids are {list(known.ids_NK.shape)}, their log-probabilities "
                f"{list(known.logp_NK.shape)} and the sampled ones {list(known.sampled_logp_N.shape)}: give K ids and "
                "as many numbers for each token, and one for what was sampled"
            )
        self.name, self.temperature = "teacher", 1.0
        self.dtype = torch.promote_types(known.logp_NK.dtype, torch.float32)
        self.shard = VocabShard(rows, vocab_size, group)
        self.hidden_NH = known.logp_NK.new_empty(tokens, 0)  # as many tokens as a head has hidden states of
        self.weight_VH = known.logp_NK.new_empty(rows, 0)
        sampled_N1 = sampled_ids_N.unsqueeze(1)
        there_NK = (known.ids_NK >= 0) & (known.ids_NK < vocab_size)
        other_N1 = (known.ids_NK != sampled_N1).all(dim=1, keepdim=True)  # what was sampled is not among the best
        logp_NK = known.logp_NK.to(self.dtype).masked_fill(~there_NK, -math.inf)
        sampled_logp_N1 = known.sampled_logp_N.to(self.dtype).unsqueeze(1)
        self._ids_NC = torch.cat([known.ids_NK.masked_fill(~there_NK, 0), sampled_N1], dim=1)
        self._logp_NC = torch.cat([logp_NK, sampled_logp_N1.masked_fill(~other_N1, -math.inf)], dim=1)
        self._other_N1 = self._rest(there_NK, other_N1, vocab_size)

    def _rest(self, there_NK: Tensor, other_N1: Tensor, vocab_size: int) -> Tensor:
        """Log q [N, 1] of each id that is not known, if they share what is left, but below the least of the best.

        Of a teacher that is sure, 1 less the known ids' mass is rounding; that bound is then nearer.
        """
        left_N1 = 1 - self._logp_NC.double().exp().sum(dim=1, keepdim=True)
        count_N1 = vocab_size - there_NK.sum(dim=1, keepdim=True) - other_N1.int()
        even_N1 = left_N1.clamp(min=torch.finfo(torch.float32).tiny).log() - count_N1.clamp(min=1).double().log()
        least_N1 = self._logp_NC[:, :-1].masked_fill(~there_NK, math.inf).amin(dim=1, keepdim=True)
        # The next number below, in this very format: an equal one with a lower id would come before it in a top-k.
        below_N1 = torch.nextafter(least_N1, torch.full_like(least_N1, -math.inf))
        return torch.minimum(even_N1.to(self.dtype), below_N1)

    def align(self, rows: int) -> None:
        """Nothing to exchange: it has the student's part of the vocabulary."""
        assert rows == self.shard.rows

    def logits_(self, part: slice, out_NW: Tensor) -> Tensor:
        """This rank's log q of some tokens into `out_NW`, padding at `NOTHING`."""
        out_NW[:, : self.shard.rows] = -math.inf
        if self.shard.rows:
            column_NC, mine_NC = local_columns(self._ids_NC[part], self.shard)
            logp_NC = self._logp_NC[part].to(out_NW.dtype)
            if mine_NC is not None:
                logp_NC = logp_NC.masked_fill(~mine_NC, -math.inf)
            # Ids that are not here point to some column: a maximum with −inf leaves what is there.
            out_NW.scatter_reduce_(1, column_NC, logp_NC, "amax")
            other_NW = out_NW == -math.inf
            torch.where(other_NW, self._other_N1[part].to(out_NW.dtype), out_NW, out=out_NW)
        return mask_padding_(out_NW, self.shard)
