"""vLLM's step loop with looks at the responses, where a watch may stop some of them, and a race of groups.

    add requests ─▶ step … step ─▶ meeting of all ranks: who reached a look? ─▶ watch.stop ─▶ abort ─▶ step …
                                                         who is complete?    ─▶ enough: abort all others, end

A look is a response length at which the watch decides. An engine goes to a meeting when one of its responses has
reached a look, but not twice within `gap` steps, and when it has nothing left to do. Until the meeting the response
runs on; if it is stopped there, its tokens after the look are thrown away. So the tokens of a response depend on the
looks alone: not on how many engines share the batch, how many responses run at once, or which of them waited. In a
race all engines meet every `RACE_GAP` steps; there the layout decides which groups are first, but the same run has the
same winners again.

Every rank of an engine has a scheduler of its own. They stay together because all of them abort the same requests after
the same step. Every meeting compares what the ranks of an engine have seen. If one of them has an error, all raise it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.distributed as dist

from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.platform import untouched_rng
from prune_opd.process import progress
from prune_opd.rollout.batch import Response
from prune_opd.rollout.long_tail import Race

STALLED = 1000  # engine steps in a row without a token, after which we give up: the longest prefill takes far fewer
RACE_GAP = 16  # engine steps between two meetings of a race: so many tokens of a response may be in vain


class Prefix(NamedTuple):
    """A response that has reached a look: its tokens since the look before.

    Only `holder`, the lowest rank of the response's engine, has the two arrays, and only if they were asked for: they
    are 64 times as large as the tokens and needed by few ranks.
    """

    row: int  # of the global batch
    new_ids: tuple[int, ...]
    holder: int
    top_ids_TK: np.ndarray | None = None  # int32, the student's most probable tokens at each position
    top_logp_TK: np.ndarray | None = None  # float32, descending


class Watch(Protocol):
    """Who decides at the looks."""

    top: int | None  # how many of the student's most probable tokens it wants at each position

    def looks(self, max_tokens: int) -> tuple[int, ...]:
        """Response lengths, ascending, at which `stop` is asked."""

    def begin(
        self, prompt_of_row: Sequence[Prompt], max_tokens_of_row: Sequence[int], begun_of_row: Sequence[Response]
    ) -> None: ...

    def stop(self, prefixes: Sequence[Prefix]) -> set[int]:
        """The rows to stop at the look that they have reached. Collective; the same on every rank."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay in the batch: row rows[i] becomes row i."""


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
    looked: int = 0  # looks that it has behind it
    cut: int | None = None  # if it was stopped: how many of its tokens are kept
    done_at: int | None = None  # engine step after which it was no longer live

    @property
    def live(self) -> bool:
        return not self.finished and self.cut is None

    @property
    def stale(self) -> int:
        return len(self.begun.ids)


def so_far(ended: int, responses: int, tokens: int) -> str:
    """How far an engine is with its responses; those of other engines are not counted."""
    return f"{ended}/{responses} responses, {tokens:,} tokens"


class StepLoop:
    """One engine's requests. `add` them all, then `advance` and `stop` in turn until `idle`."""

    def __init__(self, engine: Any, looks: Sequence[int], racing: bool = False, logprobs: bool = False) -> None:
        """racing: meet every `RACE_GAP` steps. logprobs: keep the log-probabilities of the sampled tokens."""
        self.engine, self.looks, self.racing, self.logprobs = engine, looks, racing, logprobs
        self.gap = min((after - before for before, after in pairwise((0, *looks))), default=1)
        self.requests: dict[str, _Request] = {}  # by the name that we gave
        self.steps = self.tokens = 0
        self._seen = hashlib.blake2b(digest_size=8)

    def add(self, row: int, prompt_ids: Sequence[int], params: Any, limit: int, begun: Response) -> None:
        """A response of at most `limit` tokens, `begun` included; the max_tokens of vLLM's `params` counts new ones."""
        ids = begun.ids[:limit]
        request = _Request(row, limit, begun, ids=list(ids), logprobs=list((begun.logprobs or ())[:limit]))
        request.looked = sum(look <= len(ids) for look in self.looks)
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
        """A hash of every token so far and every cut: equal on the ranks of one engine."""
        cuts = sorted((request.row, request.cut) for request in self.requests.values() if request.cut is not None)
        return f"{self._seen.hexdigest()} {hashlib.blake2b(repr(cuts).encode(), digest_size=8).hexdigest()}"

    def advance(self) -> None:
        """Step until the next meeting. RuntimeError when no token comes any more, or a response passes its limit."""
        steps = without_tokens = 0
        while not (self.idle or (steps >= self.gap and self._due()) or (self.racing and steps >= RACE_GAP)):
            self.steps += 1
            tokens = self._take(self.engine.step())
            steps += 1
            self.tokens += tokens
            progress(self._so_far)
            without_tokens = 0 if tokens else without_tokens + 1
            if without_tokens >= STALLED:
                waiting = [request.row for request in self.requests.values() if request.live]
                raise RuntimeError(
                    f"{STALLED} steps brought no token, and {len(waiting)} responses never finish (rows "
                    f"{waiting[:4]} …): the KV cache may be too small for one of them"
                )

    def _so_far(self) -> str:
        ended = sum(not request.live for request in self.requests.values())
        return so_far(ended, len(self.requests), self.tokens)

    def due(self, holder: int) -> list[Prefix]:
        """The responses that have reached a look, each with its new tokens and, on this rank, their arrays."""
        return [self._prefix(request, holder) for request in self._due()]

    def stop(self, due: Iterable[int], rows: set[int]) -> None:
        """The verdict on the rows that were due: those in `rows` are cut at their look, the others go on."""
        mine = {request.row: request for request in self.requests.values()}
        aborted: list[_Request] = []
        for row in due:
            if row not in mine:
                continue
            request = mine[row]
            if row in rows:
                request.cut = self.looks[request.looked]
                if not request.finished:
                    request.done_at = self.steps
                    aborted.append(request)
            request.looked += 1
        self._abort(aborted)  # without those that finished meanwhile; vLLM ignores names that it does not know

    def done(self) -> dict[int, int]:
        """The rows that have ended, each with the engine step at which it did."""
        return {r.row: r.done_at for r in self.requests.values() if r.done_at is not None}

    def give_up(self) -> None:
        """Nobody waits for the rest any more."""
        self._abort([request for request in self.requests.values() if request.live])

    def _abort(self, requests: Iterable[_Request]) -> None:
        """One request a call, in the order of the rows: vLLM goes through several as a set, whose order is random.

        The ranks of an engine would then free the blocks of the KV cache in different orders, and soon schedule
        different requests.
        """
        for request in sorted(requests, key=lambda request: request.row):
            self.engine.abort_request([request.name], internal=True)

    def responses(self) -> list[Response]:
        """The responses so far, in the order in which the requests were added."""
        return [_response(request, self.logprobs) for request in self.requests.values()]

    def _due(self) -> list[_Request]:
        return [request for request in self.requests.values() if self._is_due(request)]

    def _is_due(self, request: _Request) -> bool:
        if request.cut is not None or request.looked >= len(self.looks):
            return False
        look, length = self.looks[request.looked], len(request.ids)
        # A response that ended right there has nothing to cut.
        return length > look or (length == look and not request.finished)

    def _prefix(self, request: _Request, holder: int) -> Prefix:
        start = max(self.looks[request.looked - 1] if request.looked else 0, request.stale)
        end = self.looks[request.looked]
        new_ids = tuple(request.ids[start:end])
        if not request.top_ids:
            return Prefix(request.row, new_ids, holder)
        new = slice(start - request.stale, end - request.stale)
        ids, logp = (np.stack(part[new]) for part in (request.top_ids, request.top_logp))
        return Prefix(request.row, new_ids, holder, ids, logp)

    def _take(self, outputs: Iterable[Any]) -> int:
        """Add a step's tokens to their requests. Returns how many tokens there were."""
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
    """What a rank brings to a meeting. Of an engine's ranks only the lowest says more than how it is.

    due: rows that have reached a look, each with its new tokens as int32.
    """

    engine: int
    digest: str
    idle: bool
    error: str | None
    due: list[tuple[int, bytes]] = field(default_factory=list)
    done: dict[int, int] = field(default_factory=dict)


def run_together(
    loop: StepLoop, start: Callable[[], None], watch: Watch | None, race: Race | None, ranks_per_engine: int
) -> None:
    """Call `start`, which adds the requests, then generate to the end or until the race is over.

    Collective over the job.

    Raises:
        UserError: on every rank alike, when the engine of one has failed or the ranks of an engine have come apart.
    """
    engine, place = divmod(dist.get_rank(), ranks_per_engine)
    speaks = place == 0
    error = _failure(start)
    while True:
        error = error or _failure(loop.advance)
        mine = loop.due(dist.get_rank()) if speaks and not error else []
        everyone = _meet(_report(loop, engine, error, mine, loop.done() if speaks and loop.racing else {}))
        due = _due_rows(everyone[::ranks_per_engine], mine, ranks_per_engine)
        if watch is not None and due:
            stopped = watch.stop(due)
            error = _failure(partial(loop.stop, [prefix.row for prefix in due], stopped))
        if race is not None:
            for report in everyone[::ranks_per_engine]:
                race.arrive(report.done)
        over = race is not None and race.over
        if over:
            error = error or _failure(loop.give_up)
        elif not due and all(report.idle for report in everyone):
            return
        # Compare once more where ranks would wait for one that has failed or come apart: in the next step of an engine
        # with several ranks, and after the end of the race.
        if over or (due and ranks_per_engine > 1):
            _meet(_report(loop, engine, error))
        if over:
            return


def _report(
    loop: StepLoop,
    engine: int,
    error: str | None,
    due: Sequence[Prefix] = (),
    done: Mapping[int, int] | None = None,
) -> _Report:
    if error:
        return _Report(engine, loop.digest, True, error)
    tokens = [(prefix.row, np.asarray(prefix.new_ids, np.int32).tobytes()) for prefix in due]
    return _Report(engine, loop.digest, loop.idle, None, tokens, dict(done or {}))


def _due_rows(reports: Sequence[_Report], mine: Sequence[Prefix], ranks_per_engine: int) -> list[Prefix]:
    """What all engines have due, by row, this rank's own with its arrays. reports: of each engine's lowest rank."""
    own = {prefix.row: prefix for prefix in mine}
    found = [
        own.get(row) or Prefix(row, tuple(np.frombuffer(tokens, np.int32).tolist()), report.engine * ranks_per_engine)
        for report in reports
        for row, tokens in report.due
    ]
    return sorted(found, key=lambda prefix: prefix.row)


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
    """Run `call`. Returns what it raised, as text for the next meeting: the other ranks wait there."""
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
