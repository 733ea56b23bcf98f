"""What a vLLM server says of responses: for each of their tokens the teacher's best ids and what was sampled.

Token ids go there, never text: `POST /v1/completions` with the ids of prompt and response and `prompt_logprobs`. All
requests of a call are under way together. One that fails is sent again after 1, 2, 4 … seconds; each has a time by
which its whole answer must be there, so a call ends. What cannot be had is one `UserError` with address and remedy.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import aiohttp
import numpy as np

from prune_opd.config import TeacherServerConfig
from prune_opd.errors import UserError

Made = TypeVar("Made")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # of HTTP: the same request may succeed later
LONGEST_PAUSE = 30.0  # seconds between two tries
SAID = 300  # characters of an answer that are quoted


class Scores(NamedTuple):
    """Of one response: the teacher's best ids and their log-probabilities, and that of what was sampled."""

    ids_TK: np.ndarray[Any, np.dtype[np.int32]]  # most probable first, of equal ones the lower id; −1 for none
    logp_TK: np.ndarray[Any, np.dtype[np.float32]]
    sampled_T: np.ndarray[Any, np.dtype[np.float32]]


class Served(NamedTuple):
    """A model that a server offers."""

    name: str
    max_len: int | None  # tokens of prompt and response


class _PassingError(Exception):
    """A try that failed in a way that may pass."""


class TeacherClient:
    """One server's. `failures` counts the tries that failed and were repeated."""

    def __init__(self, server: TeacherServerConfig) -> None:
        assert server.url is not None
        self.server, self.failures = server, 0
        self.url = server.url.rstrip("/")

    def models(self) -> list[Served]:
        """What it serves."""
        found = asyncio.run(self._with_session(lambda session: self._ask(session, "GET", "/v1/models", None)))
        try:
            return [Served(str(one["id"]), one.get("max_model_len")) for one in found["data"]]
        except (KeyError, TypeError, AttributeError) as reason:
            raise self._strange("/v1/models", found, reason) from None

    def score(self, model: str, rows: Sequence[tuple[Sequence[int], Sequence[int]]], k: int) -> list[Scores]:
        """Of each row, (ids before the response, ids of it). Raises `UserError`."""

        async def all_rows(session: aiohttp.ClientSession) -> list[Scores]:
            free = asyncio.Semaphore(self.server.concurrency)

            async def one(prompt: Sequence[int], response: Sequence[int]) -> Scores:
                body = {"model": model, "prompt": [*prompt, *response], "max_tokens": 1, "temperature": 0.0}
                async with free:
                    answer = await self._ask(session, "POST", "/v1/completions", {**body, "prompt_logprobs": k})
                try:
                    return _scores(answer, len(prompt), response, k)
                except (KeyError, TypeError, ValueError, IndexError, AttributeError) as reason:
                    raise self._strange("/v1/completions", answer, reason) from None

            async with asyncio.TaskGroup() as tasks:  # the first that fails ends the others
                waiting = [tasks.create_task(one(*row)) for row in rows]
            return [task.result() for task in waiting]

        return asyncio.run(self._with_session(all_rows)) if rows else []

    def refuses(self, model: str, token: int) -> bool:
        """Whether a token id is outside its vocabulary."""
        body = {"model": model, "prompt": [token], "max_tokens": 1, "temperature": 0.0}
        answer = asyncio.run(
            self._with_session(lambda session: self._ask(session, "POST", "/v1/completions", body, (400,)))
        )
        return answer is None

    async def _with_session(self, use: Callable[[aiohttp.ClientSession], Awaitable[Made]]) -> Made:
        limit = aiohttp.ClientTimeout(total=self.server.timeout)  # of a whole answer, however slowly it comes
        async with aiohttp.ClientSession(timeout=limit) as session:
            try:
                return await use(session)
            except* UserError as group:
                raise _first(group) from None

    async def _ask(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any, refused: tuple[int, ...] = ()
    ) -> Any:
        """The answer's JSON; None for one of the `refused` states."""
        for tried in range(self.server.retries + 1):
            try:
                return await self._try(session, method, path, body, refused)
            except _PassingError as problem:
                last = str(problem)
            if tried < self.server.retries:
                self.failures += 1
                await asyncio.sleep(min(2.0**tried, LONGEST_PAUSE))
        raise UserError(
            f"teacher_server.url = {self.url!r}: {method} {path} failed {self.server.retries + 1} times, the last time "
            f"with {last}: see whether the server runs (make serve-teacher) and can be reached from here, or raise "
            "teacher_server.timeout or teacher_server.retries"
        )

    async def _try(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any, refused: tuple[int, ...]
    ) -> Any:
        try:
            async with session.request(method, self.url + path, json=body) as answer:
                if answer.status in refused:
                    return None
                if answer.status == 200:
                    return await answer.json(content_type=None)
                said = (await answer.text(errors="replace"))[:SAID]
        except TimeoutError:
            raise _PassingError(f"no whole answer within teacher_server.timeout = {self.server.timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as reason:  # ValueError: an answer that is no JSON
            raise _PassingError(f"{type(reason).__name__}: {reason}") from None
        if answer.status in PASSING:
            raise _PassingError(f"HTTP {answer.status}: {said}")
        raise UserError(
            f"teacher_server.url = {self.url!r} refuses {method} {path} with HTTP {answer.status}: {said}; see that it "
            "is a vLLM server of the teacher (make serve-teacher), with --max-logprobs of at least teacher_server.top_k"
        )

    def _strange(self, path: str, answer: Any, reason: Exception) -> UserError:
        return UserError(
            f"teacher_server.url = {self.url!r}: {path} answers in a way that is not vLLM's ({reason!r}): "
            f"{str(answer)[:SAID]}; give the address of a vLLM server (make serve-teacher)"
        )


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _scores(answer: Any, skipped: int, response: Sequence[int], k: int) -> Scores:
    """Out of a completion's `prompt_logprobs`: a dictionary of ids for each token but the first."""
    positions = answer["choices"][0]["prompt_logprobs"]
    if len(positions) != skipped + len(response):
        raise ValueError(f"{len(positions)} positions for {skipped + len(response)} tokens")
    shape = (len(response), k)
    scores = Scores(np.full(shape, -1, np.int32), np.full(shape, -math.inf, np.float32), np.empty(shape[0], np.float32))
    for t, (token, position) in enumerate(zip(response, positions[skipped:], strict=True)):
        logps = {int(i): float(entry["logprob"]) for i, entry in position.items()}
        if token not in logps:
            raise ValueError(f"no log-probability of token {token}")
        if not all(logp <= 1e-3 for logp in logps.values()):  # of NaN too
            raise ValueError(f"log-probabilities above 0: {position}")
        best = sorted(logps.items(), key=lambda pair: (-pair[1], pair[0]))[:k]  # what was sampled is one more
        scores.ids_TK[t, : len(best)], scores.logp_TK[t, : len(best)] = zip(*best, strict=True)
        scores.sampled_T[t] = logps[token]
    return scores
