"""vLLM's step loop with checkpoints along the responses, where a watch may stop some of them.

    add requests ─▶ step … step ─▶ meeting of all ranks: who passed a checkpoint? ─▶ watch.stop ─▶ abort ─▶ step …

An engine goes to a meeting when one of its responses has passed a checkpoint, but not twice within `gap` steps, and
when it has nothing left to do. Between the checkpoint and the meeting a response runs on; what comes after the
checkpoint is thrown away if it is stopped. So the tokens of the batch depend on the checkpoints alone, not on how many
engines share it, how many responses run at once and which of them waited.

Every rank of an engine has a scheduler of its own: they stay together because all abort the same requests after the
same step. Every meeting compares what the ranks of an engine have seen, and hands on the error of a rank that has one:
all ranks then raise the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.distributed as dist

from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.platform import untouched_rng
from prune_opd.rollout.batch import Response

STALLED = 1000  # engine steps in a row that bring no token: the longest prefill takes far fewer


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

    def begin(self, prompt_of_row: Sequence[Prompt], max_tokens_of_row: Sequence[int]) -> None: ...

    def stop(self, prefixes: Sequence[Prefix]) -> set[int]:
        """The rows to stop at the checkpoint they are at. Collective; the same on every rank."""


@dataclass
class _Request:
    row: int
    limit: int  # tokens
    name: str = ""  # vLLM's own
    ids: list[int] = field(default_factory=list)
    top_ids: list[np.ndarray] = field(default_factory=list)
    top_logp: list[np.ndarray] = field(default_factory=list)
    finished: bool = False
    reason: str | None = None
    checked: int = 0  # checkpoints that it has passed and was let through
    cut: int | None = None  # tokens that are kept of it

    @property
    def live(self) -> bool:
        return not self.finished and self.cut is None


class StepLoop:
    """One engine's requests. `add` them all, then `advance` and `stop` in turn until `idle`."""

    def __init__(self, engine: Any, checkpoints: Sequence[int]) -> None:
        self.engine, self.checkpoints = engine, checkpoints
        self.gap = checkpoints[0] if len(checkpoints) < 2 else min(checkpoints[0], checkpoints[1] - checkpoints[0])
        self.requests: dict[str, _Request] = {}  # by the name that we gave
        self._seen = hashlib.blake2b(digest_size=8)

    def add(self, row: int, prompt_ids: Sequence[int], params: Any) -> None:
        request = _Request(row, params.max_tokens)
        self.requests[str(row)] = request
        request.name = self.engine.add_request(str(row), {"prompt_token_ids": list(prompt_ids)}, params)

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
        while not self.idle and not (steps >= self.gap and self._due()):
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
                    aborted.append(request.name)
            request.checked += 1
        if aborted:  # one that finished meanwhile is not among them, and vLLM lets an unknown name pass
            self.engine.abort_request(aborted, internal=True)

    def responses(self) -> list[Response]:
        """What has become of the requests, in the order in which rows are numbered."""
        requests = sorted(self.requests.values(), key=lambda request: request.row)
        return [_response(request) for request in requests]

    def _due(self) -> list[_Request]:
        return [request for request in self.requests.values() if self._is_due(request)]

    def _is_due(self, request: _Request) -> bool:
        if request.cut is not None or request.checked >= len(self.checkpoints):
            return False
        checkpoint, length = self.checkpoints[request.checked], len(request.ids)
        # Nothing is left to cut of a response that ended right there.
        return length > checkpoint or (length == checkpoint and not request.finished)

    def _prefix(self, request: _Request) -> Prefix:
        start = self.checkpoints[request.checked - 1] if request.checked else 0
        new = slice(start, self.checkpoints[request.checked])
        if not request.top_ids:
            return Prefix(request.row, tuple(request.ids[new]), None, None)
        ids, logp = (np.stack(part[new]) for part in (request.top_ids, request.top_logp))
        return Prefix(request.row, tuple(request.ids[new]), ids, logp)

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
            if completion.logprobs is not None and ids:
                for part, values, dtype in (
                    (request.top_ids, completion.logprobs.token_ids, np.int32),
                    (request.top_logp, completion.logprobs.logprobs, np.float32),
                ):
                    part.extend(np.asarray(values, dtype).reshape(len(ids), -1)[:, 1:])  # the first is the sampled one
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
    error: str | None


def run_watched(loop: StepLoop, start: Callable[[], None], watch: Watch, engine_index: int) -> None:
    """Generate to the end, from `start`, which adds the requests. Collective over the job.

    Raises:
        UserError: on every rank alike, when the engine of one has failed or the ranks of an engine have come apart.
    """
    error = _failure(start)
    while True:
        error = error or _failure(loop.advance)
        everyone = _meet(_Report(engine_index, loop.digest, [] if error else loop.due(), error))
        first = {report.engine: report for report in reversed(everyone)}  # the lowest rank of each engine speaks
        due = sorted((prefix for report in first.values() for prefix in report.due), key=lambda prefix: prefix.row)
        if not due:
            return
        stopped = watch.stop(due)
        error = _failure(partial(loop.stop, [prefix.row for prefix in due], stopped))
        if len(first) < len(everyone):  # before a step in which some ranks of an engine would wait for the others
            _meet(_Report(engine_index, loop.digest, [], error))


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


def _response(request: _Request) -> Response:
    if request.cut is None:
        return Response(tuple(request.ids), request.reason == "stop")
    dropped = len(request.ids) - request.cut
    return Response(tuple(request.ids[: request.cut]), finished=False, stopped=True, dropped=dropped)
