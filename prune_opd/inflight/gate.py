"""The in-flight gate: a drifting response is stopped while it is generated (this project's extension of Prune-OPD).

    responses at a look ─▶ teacher, whole prefixes in one packed pass ─▶ its top-k at the new tokens
        + the student's top-k from the rollout engine ─▶ certain events ─▶ rank 0: R (method/gate.py) ─▶ all: stop

A look is a response length at which this happens. The verdict is final for the response but has no part in the loss,
which works out its own gate from the trainer's forward pass. Only events that no rounding decides count here
(certain_events.py), so R in flight is never below the loss's R: only tokens to which the loss would have given R = 0
are cut off. Every step counts the responses for which that did not hold (`inflight_too_early`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, InflightConfig, TrainConfig
from prune_opd.config.rollout import MARGIN
from prune_opd.data.ends import end_class
from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.inflight.certain_events import (
    certain_overlap_events,
    certain_rejects,
    greatest_acceptance,
    greatest_kl,
    one_end,
)
from prune_opd.inflight.look_schedule import Course, LookSchedule
from prune_opd.loss.ends import as_outcomes, end_logits, fold_
from prune_opd.loss.vocab_parallel import OutputHead, least_logit, local_gather, log_normaliser, sum_together, topk
from prune_opd.method.agreement import UNKNOWN, along_responses, needs_kl
from prune_opd.method.calibration import Usual, in_force
from prune_opd.method.gate import RELIABLE_ABOVE, apply_gate
from prune_opd.rollout.balance import Deal, deal_any, padded_size
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.stepwise import Prefix

if TYPE_CHECKING:
    from prune_opd.megatron.layout import Layout
    from prune_opd.megatron.redistribute import KeptHidden
    from prune_opd.megatron.teacher import Teacher


class InflightGate:
    """Watches the responses of one batch after the other (`rollout.stepwise.Watch`)."""

    def __init__(self, config: TrainConfig, teacher: Teacher, layout: Layout, vocab_size: int):
        assert config.gate is not None  # TrainConfig has seen to it
        self.config, self.settings = config, config.rollout.inflight
        self.calibrate(None)
        self.teacher, self.layout, self.vocab_size = teacher, layout, vocab_size
        self.candidates = min(2 * self.gate.k, vocab_size)  # more than k, to see how close a call is
        self.top = None if self.gate.metric == "teacher_top_p" else self.candidates
        self.ends = end_class(config, vocab_size)
        margin = self.settings.margin
        self.margin = MARGIN[config.rollout.coarsest_format(config.precision.params)] if margin is None else margin
        self.schedule = LookSchedule(self.settings.price)
        self.chosen: tuple[int, ...] = ()  # the batch's looks
        self.begin([], [], [])

    def calibrate(self, usual: Usual | None) -> None:
        """Judge from now on by what is usual for the pair, for a gate that does."""
        gate = in_force(self.config.gate, usual)
        assert gate is not None
        self.gate, self.usual = gate, usual

    def looks(self, max_tokens: int) -> tuple[int, ...]:
        self.chosen = self.schedule.choose(self.settings.looks(max_tokens))
        return self.chosen

    def begin(
        self, prompt_of_row: Sequence[Prompt], max_tokens_of_row: Sequence[int], begun_of_row: Sequence[Response]
    ) -> None:
        """Forget the last batch: row i of the next one answers prompt_of_row[i], in at most max_tokens_of_row[i].

        begun_of_row: what each row already has from earlier steps. These stale tokens never count as events: what the
        student thinks of them now is not known here, and fewer events cut no reliable token.
        """
        from prune_opd.megatron.redistribute import KeptHidden

        self.prompts, self.limits = list(prompt_of_row), list(max_tokens_of_row)
        self.ids = [list(begun.ids) for begun in begun_of_row]
        # On rank 0, of every token: whether it is an event, or the greatest acceptance or KL that it may have.
        nothing = UNKNOWN if needs_kl(self.gate) else float(self.gate.along)
        self.evidence = [[nothing] * len(begun.ids) for begun in begun_of_row]
        self.kept: KeptHidden = KeptHidden()
        self.teacher_tokens = self.checks = 0
        self.seconds = 0.0

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay in the batch: row rows[i] becomes row i."""
        from prune_opd.megatron.redistribute import KeptHidden

        number = {row: i for i, row in enumerate(rows)}
        self.limits = [self.limits[row] for row in rows]
        kept = self.kept
        self.kept = KeptHidden(
            {number[row]: where for row, where in kept.holders_of.items() if row in number},
            {number[row]: hidden for row, hidden in kept.of_row.items() if row in number},
        )

    def stop(self, prefixes: Sequence[Prefix]) -> set[int]:
        """The rows whose reliability is gone at the look that they have reached. Collective over the job."""
        started = time.perf_counter()
        for prefix in prefixes:
            self.ids[prefix.row] += prefix.new_ids
        # The rows that are due, as a batch of their own: number i of it is prefixes[i].
        due = Rollouts(
            tuple(self.prompts[prefix.row] for prefix in prefixes),
            tuple(Response(tuple(self.ids[prefix.row]), finished=False) for prefix in prefixes),
        )
        student, budget = self.layout.student, self.config.parallel.microbatch_tokens
        lengths = [padded_size(length, student.row_multiple) for length in due.row_length_B]
        dealt = deal_any(lengths, range(len(prefixes)), student.dp, budget * student.cp)
        hidden, computed = self.teacher.look(due, [dealt])
        tops = self._tops(prefixes, dealt)
        evidence: dict[int, list[float]] = {}
        if student.is_last_stage:
            mine = [row for rows in dealt[student.dp_rank] for row in rows]
            evidence = self._evidence({row: prefixes[row] for row in mine}, hidden.of_row, tops)
        stopped = self._decide(prefixes, evidence if self.layout.reports else {})
        self._keep([i for i, prefix in enumerate(prefixes) if prefix.row in stopped], prefixes, computed)
        self.teacher_tokens += sum(due.teacher_row_length_B)
        self.checks += 1
        self.seconds += time.perf_counter() - started
        return stopped

    def learn(self, rollouts: Rollouts, reliable_length_B: Tensor) -> None:
        """Take in how a batch went by the loss's gate; the looks of the next batch are chosen by it."""
        self.schedule.learn(courses(rollouts, reliable_length_B.tolist(), self.limits, self.chosen))

    def record(self, rollouts: Rollouts, reliable_length_B: Tensor) -> dict[str, Any]:
        """What the gate did to the batch, for metrics.jsonl (track/assets/metrics.yaml has the meanings)."""
        stopped = [row for row in rollouts.stopped_rows if rollouts.responses[row].fresh]  # in this step
        left = [response for group in rollouts.left for response in group.begun]
        length_B, limits = rollouts.length_B, self.limits
        return {
            "pruned_inflight": len(stopped) + sum(response.stopped and response.fresh > 0 for response in left),
            "tokens_avoided": sum(_expected(rollouts, length_B[row], limits[row]) - length_B[row] for row in stopped),
            "tokens_dropped": sum(response.dropped for response in (*rollouts.responses, *left)),
            "teacher_tokens_inflight": self.teacher_tokens,
            "teacher_tokens_reused": sum(rollouts.teacher_row_length_B[row] for row in self.kept.holders_of),
            "inflight_checks": self.checks,
            "inflight_too_early": sum(bool(reliable_length_B[row] >= length_B[row]) for row in stopped),
            "time_inflight": self.seconds,
        }

    def _tops(self, prefixes: Sequence[Prefix], dealt: Deal) -> dict[int, Tensor]:
        """The student's candidates of the rows that this rank judges: [T, 2C], ids and the bits of their log p.

        From each row's engine to the ranks that judge it, and to no others. Collective over the job.
        """
        from prune_opd.megatron.redistribute import find_routes, redistribute, replica_of_row

        if self.top is None:
            return {}
        device, mine = self.teacher.nothing.device, {}
        for i, prefix in enumerate(prefixes):
            if prefix.top_ids_TK is not None and prefix.top_logp_TK is not None:
                both = np.concatenate([prefix.top_ids_TK, prefix.top_logp_TK.view(np.int32)], axis=1)
                mine[i] = torch.from_numpy(both).to(device)
        lengths = [len(prefix.new_ids) for prefix in prefixes]
        holders = {i: (prefix.holder,) for i, prefix in enumerate(prefixes)}
        routes = find_routes(holders, replica_of_row([dealt]), self.layout.student, lengths)
        return redistribute(
            mine, lengths, routes, torch.empty(0, 2 * self.top, dtype=torch.int32, device=device)
        ).of_row

    @torch.no_grad()
    def _evidence(
        self, prefixes: Mapping[int, Prefix], hidden_of: Mapping[int, Tensor], tops: Mapping[int, Tensor]
    ) -> dict[int, list[float]]:
        """Evidence at the new tokens of some rows, by their number among the due. Collective over student TP ranks."""
        if not prefixes:
            return {}
        new = {row: len(prefix.new_ids) for row, prefix in prefixes.items()}
        hidden_NH = torch.cat([hidden_of[row][-count:] for row, count in new.items()])
        head = OutputHead(
            "teacher",
            hidden_NH,
            self.teacher.head_weight,
            self.config.objective.of_teacher,
            self.vocab_size,
            self.layout.student.tp_group,
        )
        chunk = min(self.config.parallel.loss_chunk_tokens, len(hidden_NH))
        head.allocate(chunk, torch.float32)
        parts = [slice(first, first + chunk) for first in range(0, len(hidden_NH), chunk)]
        heat = self.config.objective.temperature
        sampled_N = torch.tensor([token for p in prefixes.values() for token in p.new_ids], device=hidden_NH.device)
        both_NC = torch.cat([tops[row] for row in prefixes]) if tops else None
        seen = _Seen(sampled_N, both_NC, self.vocab_size, self.ends, heat)
        evidence_N = torch.cat([self._chunk_evidence(head, seen, part) for part in parts]).double()
        return {row: part.tolist() for row, part in zip(new, evidence_N.split(list(new.values())), strict=True)}

    def _chunk_evidence(self, head: OutputHead, seen: _Seen, part: slice) -> Tensor:
        gate, logits_NV = self.gate, head.logits(part)
        if self.ends:
            fold_(logits_NV, end_logits([logits_NV], self.ends, [head.shard])[0], self.ends, head.shard)
        if gate.along:
            ids_NC, logp_NC, _ = seen.top(part)
            (at_NC,) = sum_together([local_gather(logits_NV, ids_NC, head.shard)], head.shard.group)
            total_N1 = log_normaliser(logits_NV, head.shard)[:, None]
            teacher_logp_NC = at_NC - total_N1
            if needs_kl(gate):
                least_N = least_logit(logits_NV, head.shard) - total_N1[:, 0]
                return greatest_kl(logp_NC, teacher_logp_NC, least_N, self.margin, self.vocab_size)
            return greatest_acceptance(ids_NC, logp_NC, teacher_logp_NC, gate.k, self.margin, self.vocab_size)
        teacher = topk(logits_NV, self.candidates, head.shard)
        if gate.metric == "overlap":
            student_ids_NC, student_logp_NC, slack_N1 = seen.top(part)
            return certain_overlap_events(
                student_ids_NC,
                student_logp_NC,
                teacher.ids_NK,
                teacher.values_NK * head.temperature,  # the margin is one of the models' own scores
                gate.k,
                gate.threshold,
                self.margin + slack_N1,
                self.vocab_size,
            )
        logp_NC = teacher.values_NK - log_normaliser(logits_NV, head.shard)[:, None]
        return certain_rejects(seen.sampled_N[part], teacher.ids_NK, logp_NC, gate.k, gate.top_p, self.margin)

    def _decide(self, prefixes: Sequence[Prefix], evidence: Mapping[int, list[float]]) -> set[int]:
        """Rank 0 hears of all evidence, decides, and tells everybody."""
        is_main = dist.get_rank() == 0
        gathered: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(dict(evidence), gathered)
        verdict: list[Any] = [None]
        if gathered is not None:
            verdict[0] = self._verdict(prefixes, {i: row for part in gathered for i, row in part.items()})
        dist.broadcast_object_list(verdict)
        if isinstance(verdict[0], str):
            raise UserError(verdict[0])
        return verdict[0]

    def _verdict(self, prefixes: Sequence[Prefix], evidence: Mapping[int, list[float]]) -> set[int] | str:
        stopped = set()
        for i, prefix in enumerate(prefixes):
            if i not in evidence or len(evidence[i]) != len(prefix.new_ids):
                return (
                    f"the in-flight gate has judged {len(evidence.get(i, []))} of the {len(prefix.new_ids)} new tokens "
                    f"of row {prefix.row}: the ranks disagree about who scores it; start again from the last checkpoint"
                )
            self.evidence[prefix.row] += evidence[i]
            if is_spent(self._events(self.evidence[prefix.row]), self.gate, self.settings):
                stopped.add(prefix.row)
        return stopped

    def _events(self, evidence: Sequence[float]) -> list[bool]:
        """Events of a response so far."""
        watch = along_responses([0, len(evidence)], self.gate, self.usual)
        if watch is None:
            return [value > 0 for value in evidence]
        return watch.advance(torch.tensor(evidence, dtype=torch.float64)).tolist()

    def _keep(self, stopped: Sequence[int], prefixes: Sequence[Prefix], computed: KeptHidden) -> None:
        """Hold on to what the teacher knows of rows that end here: they are whole."""
        for i in stopped:
            self.kept.holders_of[prefixes[i].row] = computed.holders_of[i]
            if i in computed.of_row:  # a copy: a view would hold the whole micro-batch
                self.kept.of_row[prefixes[i].row] = computed.of_row[i].clone()


class _Seen:
    """What the rollout engine says about the new tokens of some rows, end to end."""

    def __init__(
        self, sampled_N: Tensor, both_NC: Tensor | None, vocab_size: int, ends: tuple[int, ...], temperature: float
    ) -> None:
        """both_NC: the student's candidates, as `_tops` has them."""
        self.sampled_N = as_outcomes(sampled_N, ends)
        self.vocab_size, self.ends, self.temperature = vocab_size, ends, temperature
        if both_NC is not None:
            self._ids_NC, bits_NC = (half.contiguous() for half in both_NC.chunk(2, dim=1))
            self._logp_NC = bits_NC.view(torch.float32)

    def top(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The student's candidates [N, C], int64, and their log-probabilities, descending; padding ids come last.

        And by how much the class of ends may score higher than it does here [N, 1].
        """
        ids_NC, logp_NC = self._ids_NC[part].long(), self._logp_NC[part]
        slack_N1 = torch.zeros_like(logp_NC[:, :1])
        if self.ends:
            ids_NC, logp_NC, slack_N1 = one_end(ids_NC, logp_NC, self.ends, self.temperature)
        logp_NC = logp_NC.masked_fill(ids_NC >= self.vocab_size, float("-inf"))
        logp_NC, order_NC = logp_NC.sort(dim=-1, descending=True, stable=True)
        return ids_NC.gather(1, order_NC), logp_NC, slack_N1


def is_spent(events: Sequence[bool], gate: GateConfig, settings: InflightConfig) -> bool:
    """Whether a response with these events is stopped: R has reached 0, or its `stop_events` are spent."""
    if settings.stop_events is not None:
        return sum(events) >= settings.stop_events
    event_1T = torch.tensor([events])
    last = apply_gate(event_1T, torch.ones_like(event_1T), gate).reliability_BT[0, -1].item()
    return last <= RELIABLE_ABOVE


def courses(
    rollouts: Rollouts, reliable_length_B: Sequence[float], limits: Sequence[int], looks: Sequence[int]
) -> list[Course]:
    """How each response went that the loss's gate has judged (a NaN in reliable_length_B: it has not)."""
    found = []
    rows = zip(rollouts.prompt_ids, rollouts.responses, reliable_length_B, limits, strict=True)
    for prompt, response, reliable, limit in rows:
        if math.isnan(reliable):
            continue
        length = len(response.ids)
        spent = int(reliable) + 1 if reliable < length else length if response.stopped else None
        passed = max((look for look in looks if look < length), default=0)
        if spent is not None and spent <= passed:  # but the look let it through: not every event is certain
            spent = passed + 1
        whole = _expected(rollouts, length, limit) if response.stopped else length
        found.append(Course(len(prompt), whole, spent))
    return found


def _expected(rollouts: Rollouts, length: int, limit: int) -> float:
    """Estimated length that a response cut at `length` tokens would have reached.

    The mean length of the batch's other responses that went past `length`; if there are none, its limit.
    """
    others = [len(r.ids) for r in rollouts.responses if not r.stopped and len(r.ids) > length]
    return sum(others) / len(others) if others else limit
