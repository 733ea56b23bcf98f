"""vLLM's step loop with checkpoints along the responses, where a watch may stop some of them, and a race of groups.

    add requests ─▶ step … step ─▶ meeting of all ranks: who passed a checkpoint? ─▶ watch.stop ─▶ abort ─▶ step …
                                                         who is complete?        ─▶ enough: abort all others, end

An engine goes to a meeting when one of its responses has passed a checkpoint, but not twice within `gap` steps, and
when it has nothing left to do. Between the checkpoint and the meeting a response runs on; what comes after the
checkpoint is thrown away if it is stopped. So the tokens of a response depend on the checkpoints alone, not on how many
engines share the batch, how many responses run at once and which of them waited. In a race all engines meet every
`RACE_GAP` steps; there the layout decides which groups are first, but the same run has the same winners again.

Every rank of an engine has a scheduler of its own: they stay together because all abort the same requests after the
same step. Every meeting compares what the ranks of an engine have seen, and hands on the error of a rank that has one:
all ranks then raise the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.distributed as dist

from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.platform import untouched_rng
from prune_opd.rollout.batch import Response
from prune_opd.rollout.long_tail import Race

STALLED = 1000  # engine steps in a row that bring no token: the longest prefill takes far fewer
RACE_GAP = 16  # engine steps between two meetings of a race: as many tokens of a response may be in vain


class Prefix(NamedTuple):
    """A response that has passed a checkpoint: what has come since the one before."""

    row: int  # of the global batch
    new_ids: tuple[int, ...]
    top_ids_TK: np.ndarray | None  # int32, the student's most probable words at each of them, when asked for
    top_logp_TK: np.ndarray | None  # float32, descending


class Watch(Protocol):
    """Who decides at the checkpoints."""

    top: int | None  # how many of the student's most probable words are wanted of each token

    def checkpoints(self, max_tokens: int) -> tuple[int, ...]: ...

    def begin(
        self, prompt_of_row: Sequence[Prompt], max_tokens_of_row: Sequence[int], begun_of_row: Sequence[Response]
    ) -> None: ...

    def stop(self, prefixes: Sequence[Prefix]) -> set[int]:
        """The rows to stop at the checkpoint they are at. Collective; the same on every rank."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows are left of the batch, and are numbered anew in this order."""


@dataclass
class _Request:
    row: int
    limit: int  # tokens
    begun: Response  # of earlier steps
    name: str = ""  # vLLM's own
    ids: list[int] = field(default_factory=list)  # those of `begun` included
    logprobs: list[float] = field(default_factory=list)  # of the sampled tokens, when asked for
    top_ids: list[np.ndarray] = field(default_factory=list)  # of this step's tokens
    top_logp: list[np.ndarray] = field(default_factory=list)
    finished: bool = False
    reason: str | None = None
    checked: int = 0  # checkpoints that it has passed and was let through
    cut: int | None = None  # tokens that are kept of it
    done_at: int | None = None  # engine step after which it was no longer live

    @property
    def live(self) -> bool:
        return not self.finished and self.cut is None

    @property
    def stale(self) -> int:
        return len(self.begun.ids)


class StepLoop:
    """One engine's requests. `add` them all, then `advance` and `stop` in turn until `idle`."""

    def __init__(self, engine: Any, checkpoints: Sequence[int], racing: bool = False, logprobs: bool = False) -> None:
        """racing: meet every `RACE_GAP` steps. logprobs: keep those of the sampled tokens."""
        self.engine, self.checkpoints, self.racing, self.logprobs = engine, checkpoints, racing, logprobs
        self.gap = min((after - before for before, after in pairwise((0, *checkpoints))), default=1)
        self.requests: dict[str, _Request] = {}  # by the name that we gave
        self.steps = 0
        self._seen = hashlib.blake2b(digest_size=8)

    def add(self, row: int, prompt_ids: Sequence[int], params: Any, limit: int, begun: Response) -> None:
        """A response of at most `limit` tokens, `begun` included; params: of vLLM, with the tokens that are to come."""
        ids = begun.ids[:limit]
        request = _Request(row, limit, begun, ids=list(ids), logprobs=list((begun.logprobs or ())[:limit]))
        request.checked = sum(checkpoint <= len(ids) for checkpoint in self.checkpoints)
        self.requests[str(row)] = request
        if begun.ended(limit):
            request.finished, request.done_at = True, 0
            request.reason = "stop" if begun.finished and len(begun.ids) <= limit else "length"
            return
        request.name = self.engine.add_request(str(row), {"prompt_token_ids": [*prompt_ids, *ids]}, params)

    @property
    def idle(self) -> bool:
        return not any(request.live for request in self.requests.values())

    @property
    def digest(self) -> str:
        """Of every token so far and every cut: equal on the ranks of one engine."""
        cuts = sorted((request.row, request.cut) for request in self.requests.values() if request.cut is not None)
        return f"{self._seen.hexdigest()} {hashlib.blake2b(repr(cuts).encode(), digest_size=8).hexdigest()}"

    def advance(self) -> None:
        """Step until the next meeting. RuntimeError when the engine makes no progress or overshoots."""
        steps = without_tokens = 0
        while not (self.idle or (steps >= self.gap and self._due()) or (self.racing and steps >= RACE_GAP)):
            self.steps += 1
            tokens = self._take(self.engine.step())
            steps += 1
            without_tokens = 0 if tokens else without_tokens + 1
            if without_tokens >= STALLED:
                waiting = [request.row for request in self.requests.values() if request.live]
                raise RuntimeError(
                    f"{STALLED} steps brought no token, and {len(waiting)} responses never finish (rows "
                    f"{waiting[:4]} …): the KV cache may be too small for one of them"
                )

    def due(self) -> list[Prefix]:
        """The responses that are past a checkpoint, with what is new of each."""
        return [self._prefix(request) for request in self._due()]

    def stop(self, due: Iterable[int], rows: set[int]) -> None:
        """The verdict on the rows that were due: `rows` are cut at their checkpoints, the others go on."""
        mine = {request.row: request for request in self.requests.values()}
        aborted = []
        for row in due:
            if row not in mine:
                continue
            request = mine[row]
            if row in rows:
                request.cut = self.checkpoints[request.checked]
                if not request.finished:
                    request.done_at = self.steps
                    aborted.append(request.name)
            request.checked += 1
        if aborted:  # one that finished meanwhile is not among them, and vLLM lets an unknown name pass
            self.engine.abort_request(aborted, internal=True)

    def done(self) -> dict[int, int]:
        """The rows that have ended, with the engine step of it."""
        return {r.row: r.done_at for r in self.requests.values() if r.done_at is not None}

    def give_up(self) -> None:
        """Nobody waits for the rest any more."""
        self.engine.abort_request([request.name for request in self.requests.values() if request.live], internal=True)

    def responses(self) -> list[Response]:
        """What has become of the requests, in the order in which they were added."""
        return [_response(request, self.logprobs) for request in self.requests.values()]

    def _due(self) -> list[_Request]:
        return [request for request in self.requests.values() if self._is_due(request)]

    def _is_due(self, request: _Request) -> bool:
        if request.cut is not None or request.checked >= len(self.checkpoints):
            return False
        checkpoint, length = self.checkpoints[request.checked], len(request.ids)
        # Nothing is left to cut of a response that ended right there.
        return length > checkpoint or (length == checkpoint and not request.finished)

    def _prefix(self, request: _Request) -> Prefix:
        start = max(self.checkpoints[request.checked - 1] if request.checked else 0, request.stale)
        end = self.checkpoints[request.checked]
        new_ids = tuple(request.ids[start:end])
        if not request.top_ids:
            return Prefix(request.row, new_ids, None, None)
        new = slice(start - request.stale, end - request.stale)
        ids, logp = (np.stack(part[new]) for part in (request.top_ids, request.top_logp))
        return Prefix(request.row, new_ids, ids, logp)

    def _take(self, outputs: Iterable[Any]) -> int:
        """File the tokens of a step under their requests; how many there were."""
        tokens = 0
        for output in outputs:
            request = self.requests[output.request_id.partition("-")[0]]
            if not request.live:  # a step that was under way when it was cut
                continue
            (completion,) = output.outputs
            ids = list(completion.token_ids)
            request.ids += ids
            request.finished, request.reason = output.finished, completion.finish_reason
            if request.finished:
                request.done_at = self.steps
            if completion.logprobs is not None and ids:
                top_ids_TK, top_logp_TK = (
                    np.asarray(values, dtype).reshape(len(ids), -1)
                    for values, dtype in (
                        (completion.logprobs.token_ids, np.int32),
                        (completion.logprobs.logprobs, np.float32),
                    )
                )
                if self.logprobs:
                    request.logprobs += top_logp_TK[:, 0].tolist()  # the first is the sampled one
                if top_ids_TK.shape[1] > 1:
                    request.top_ids.extend(top_ids_TK[:, 1:])
                    request.top_logp.extend(top_logp_TK[:, 1:])
            self._seen.update(repr((request.row, ids, request.finished)).encode())
            if len(request.ids) > request.limit:
                raise RuntimeError(f"row {request.row} has {len(request.ids)} tokens, above its {request.limit}")
            tokens += len(ids)
        return tokens


@dataclass(frozen=True)
class _Report:
    """What a rank brings to a meeting."""

    engine: int
    digest: str
    due: list[Prefix]
    done: dict[int, int]
    idle: bool
    error: str | None


def run_together(
    loop: StepLoop, start: Callable[[], None], watch: Watch | None, race: Race | None, engine_index: int
) -> None:
    """Generate to the end, or until the race is over, from `start`, which adds the requests. Collective over the job.

    Raises:
        UserError: on every rank alike, when the engine of one has failed or the ranks of an engine have come apart.
    """
    error = _failure(start)
    while True:
        error = error or _failure(loop.advance)
        everyone = _meet(_report(loop, engine_index, error))
        first = {report.engine: report for report in reversed(everyone)}  # the lowest rank of each engine speaks
        due = sorted((prefix for report in first.values() for prefix in report.due), key=lambda prefix: prefix.row)
        if watch is not None and due:
            stopped = watch.stop(due)
            error = _failure(partial(loop.stop, [prefix.row for prefix in due], stopped))
        if race is not None:
            for report in first.values():
                race.arrive(report.done)
        over = race is not None and race.over
        if over:
            error = error or _failure(loop.give_up)
        elif not due and all(report.idle for report in everyone):
            return
        # Before a step in which some ranks of an engine would wait for the others, and before the race's last word.
        if over or (due and len(first) < len(everyone)):
            _meet(_report(loop, engine_index, error))
        if over:
            return


def _report(loop: StepLoop, engine_index: int, error: str | None) -> _Report:
    if error:
        return _Report(engine_index, loop.digest, [], {}, True, error)
    return _Report(engine_index, loop.digest, loop.due(), loop.done() if loop.racing else {}, loop.idle, error)


def _meet(report: _Report) -> list[_Report]:
    """The reports of all ranks; UserError where one has failed or an engine's ranks have come apart.

    An engine of several ranks whose one rank fails in the middle of a step keeps the others inside it: nobody comes to
    the meeting. The collective's time limit then ends it, and the rank that failed says why.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, report)
    except RuntimeError as timeout:
        if report.error is None:
            raise
        raise UserError(_lost([f"rank {dist.get_rank()}: {report.error}"])) from timeout
    _raise_if_broken(everyone)
    return everyone


def _failure(call: Callable[[], None]) -> str | None:
    """What went wrong in `call`, in words: a rank must come to the meeting with it, where the others wait."""
    try:
        with untouched_rng():
            call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _raise_if_broken(everyone: Sequence[_Report]) -> None:
    failed = [f"rank {rank}: {report.error}" for rank, report in enumerate(everyone) if report.error]
    if failed:
        raise UserError(_lost(failed))
    for engine in {report.engine for report in everyone}:
        ranks = [rank for rank, report in enumerate(everyone) if report.engine == engine]
        if len({everyone[rank].digest for rank in ranks}) > 1:
            raise UserError(
                f"the ranks {', '.join(map(str, ranks))} of rollout engine {engine} disagree about the tokens or the "
                "stops of their responses: their schedulers have come apart; start the run again from its checkpoint"
            )


def _lost(failures: Sequence[str]) -> str:
    return (
        f"the rollout engine failed while it generated ({'; '.join(failures)}): the step is lost and the last "
        "checkpoint is whole; start the run again to go on from there"
    )


def _response(request: _Request, logprobs: bool) -> Response:
    end = len(request.ids) if request.cut is None else request.cut
    return Response(
        ids=tuple(request.ids[:end]),
        finished=request.cut is None and request.reason == "stop",
        logprobs=tuple(request.logprobs[:end]) if logprobs else None,
        stopped=request.cut is not None or request.begun.stopped,
        dropped=len(request.ids) - end,
        stale=min(request.stale, end),
    )
