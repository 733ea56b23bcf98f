"""The teacher's self-test: whether it finds text likely that any right teacher does, before anything is learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from prune_opd.config import TrainConfig
from prune_opd.config.teachers import own_names
from prune_opd.data.prompt import Prompt
from prune_opd.data.prompts import reference_texts
from prune_opd.data.sampler import Sampler
from prune_opd.errors import UserError
from prune_opd.loss import KnownTop
from prune_opd.loss.vocab_parallel import OutputHead, local_gather, log_normaliser, sum_together
from prune_opd.megatron.served_teacher import ServedTeacher
from prune_opd.megatron.teacher import Teacher
from prune_opd.rollout.balance import deal_any, padded_size
from prune_opd.rollout.batch import Response, Rollouts


def check_teacher(
    config: TrainConfig, teacher: Teacher | ServedTeacher, sampler: Sampler, vocab_size: int, name: str = ""
) -> str | None:
    """Have the teacher score the reference text of the first `survival.teacher_test` prompts.

    Of a mixture those of its first source; with several teachers those that it teaches. name: its own among them, ""
    where there is one. Collective over the job.

    Reference text (`data.prompts.reference_text`) is a worked solution where the task has one (the ledger), else the
    prompt itself from its second token on. The rule: the median of log q over its tokens must be above −½ ln V, half of
    what an even guess over the V tokens costs; half of the tokens are then likelier than 1/√V. Language is far above
    it, weights that are shuffled, cut wrongly or of another model are below (seen: a real teacher of 135 M parameters,
    V = 49152, −2.4 on chat and −2.7 on arithmetic prompts, limit −5.4, shuffled −26.6). The median leaves room for
    tokens that nobody can know.

    Own greedy continuations would not do: a sharp model with shuffled weights finds its own repetitions likelier (−0.1
    nats a token on the tiny pair) than the right one finds its own (−0.4).

    Limits: a teacher that is merely weak, of another domain or fine-tuned badly passes, and so does one that knows the
    language but not the chat template: `prune-opd check` compares the templates. Prompts of random symbols may be
    refused though nothing is wrong: `survival.teacher_test=0` is for them.

    Returns what is to be said of it; None if it is switched off or there is no text. Raises `UserError` on all ranks.
    """
    if config.teacher_cache.mode == "only" and config.survival.teacher_test:
        return "teacher: its layers are not loaded (teacher_cache.mode = only), so it is not tested"
    source, pairs = reference_texts(sampler, config.survival.teacher_test, name)
    longest = config.horizon.max_len
    rows = [(prompt, text[:longest]) for prompt, text in pairs if text]
    if not rows:
        return None
    logq = _score(teacher, rows, vocab_size, config)
    found, limit = median(logq), -math.log(vocab_size) / 2
    if not found > limit:
        problem = (
            f"teacher = {config.teacher!r} finds reference text of {source} unlikely: the median log-probability "
            f"of {len(logq)} tokens is {found:.2f} nats (limit: {limit:.2f}; an even guess has {2 * limit:.2f}): its "
            "weights are not those of its config.json and tokenizer; copy the checkpoint again, or set "
            "survival.teacher_test=0 where the prompts are no language"
        )
        raise UserError(own_names(name, problem))
    return f"teacher: reference text has a median log-probability of {found:.2f} nats (limit: {limit:.2f})"


@torch.no_grad()
def _score(
    teacher: Teacher | ServedTeacher,
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    vocab_size: int,
    config: TrainConfig,
) -> list[float]:
    """log q of every token of the texts that follow the prompts, on every rank alike."""
    layout, student = teacher.layout, teacher.layout.student
    batch = Rollouts(
        tuple(Prompt(i, prompt, None, "reference") for i, (prompt, _) in enumerate(rows)),
        tuple(Response(text, finished=False) for _, text in rows),
    )
    lengths = [padded_size(length, student.row_multiple) for length in batch.row_length_B]
    dealt = deal_any(lengths, range(len(rows)), student.dp, config.parallel.microbatch_tokens * student.cp)
    hidden, _ = teacher.look(batch, [dealt])
    found: dict[int, list[float]] = {}
    if student.is_last_stage:
        for row in (row for part in dealt[student.dp_rank] for row in part):
            hidden_NH = hidden.of_row[row]
            if isinstance(view := teacher.view(hidden_NH), KnownTop):
                found[row] = view.sampled_logp_N.tolist()
                continue
            head = OutputHead("teacher", *view, 1.0, vocab_size, student.tp_group)
            chunk = min(config.parallel.loss_chunk_tokens, len(hidden_NH))
            head.allocate(chunk, torch.float32)
            ids_N = torch.tensor(batch.responses[row].ids, device=hidden_NH.device)
            found[row] = []
            for first in range(0, len(hidden_NH), chunk):
                part = slice(first, first + chunk)
                logits_NV = head.logits(part)
                (at_N1,) = sum_together([local_gather(logits_NV, ids_N[part, None], head.shard)], head.shard.group)
                found[row] += (at_N1[:, 0] - log_normaliser(logits_NV, head.shard)).tolist()
    everyone: list[Any] = [None] * layout.world
    dist.all_gather_object(everyone, found if layout.reports else {})
    return [logq for of_rank in everyone for row in of_rank.values() for logq in row]
