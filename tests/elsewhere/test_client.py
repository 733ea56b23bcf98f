"""The client of a teacher's server: what it asks, what it makes of answers, and that every fault is one error, soon."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from prune_opd.config import TeacherServerConfig
from prune_opd.elsewhere import client as client_module
from prune_opd.elsewhere.client import Scores, TeacherClient
from prune_opd.errors import UserError
from tests.elsewhere.fake_server import VOCAB, Answer, best_ids, failing, running, slowly, vllm

ROWS = [((1, 2), (3, 0, 9)), ((4,), (5,))]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LONGEST_PAUSE", 0.01)


def client(url: str, **settings: Any) -> TeacherClient:
    return TeacherClient(TeacherServerConfig(url=url, **{"top_k": 4, "timeout": 5.0, "retries": 2} | settings))


def score(url: str, **settings: Any) -> list[Scores]:
    return client(url, **settings).score("teacher", ROWS, settings.get("top_k", 4))


def test_it_asks_with_ids_and_gets_each_tokens_best_and_the_sampled_one() -> None:
    with running() as fake:
        first, second = score(fake.url)
    assert sorted(body["prompt"] for body in fake.asked) == [[1, 2, 3, 0, 9], [4, 5]]
    assert all(body["prompt_logprobs"] == 4 and body["max_tokens"] == 1 for body in fake.asked)
    assert first.ids_TK.tolist() == [[0, 1, 2, 3]] * 3 and second.ids_TK.tolist() == [[0, 1, 2, 3]]
    assert first.logp_TK.tolist() == [[0.0, -1.0, -2.0, -3.0]] * 3
    assert first.sampled_T.tolist() == [-3.0, 0.0, -9.0] and second.sampled_T.tolist() == [-5.0]
    assert first.ids_TK.dtype == np.int32 and first.logp_TK.dtype == first.sampled_T.dtype == np.float32


def test_equal_ones_stand_by_their_ids_and_none_is_there_twice() -> None:
    def answer(path: str, body: Any) -> Answer:
        entry = {str(i): {"logprob": -1.5} for i in (9, 3, 7, 5)}
        return 200, {"choices": [{"prompt_logprobs": [None] + [entry] * (len(body["prompt"]) - 1)}]}

    with running(answer) as fake:
        (found,) = client(fake.url).score("teacher", [((1,), (7,))], 3)
    assert found.ids_TK.tolist() == [[3, 5, 7]] and found.sampled_T.tolist() == [-1.5]


def test_fewer_ids_than_asked_for_are_filled_up_with_none() -> None:
    with running(lambda path, body: (200, {"choices": [{"prompt_logprobs": best_ids(body["prompt"], 2)}]})) as fake:
        (found,) = client(fake.url).score("teacher", [((1,), (0,))], 4)
    assert found.ids_TK.tolist() == [[0, 1, -1, -1]] and found.logp_TK.tolist() == [[0.0, -1.0, -math.inf, -math.inf]]


def test_no_rows_ask_nothing() -> None:
    with running() as fake:
        assert client(fake.url).score("teacher", [], 4) == [] and fake.asked == []


def test_the_requests_of_a_call_are_under_way_together_and_no_more_than_allowed() -> None:
    with running(slowly(0.2)) as fake:
        found = client(fake.url, concurrency=4).score("teacher", [((1,), (i,)) for i in range(12)], 4)
    assert [scores.sampled_T[0] for scores in found] == [-float(i) for i in range(12)]  # in their order
    assert 2 <= fake.most <= 4


@pytest.mark.parametrize("state", [429, 500, 503])
def test_what_passes_is_tried_again(state: int) -> None:
    with running(failing(2, state)) as fake:
        asking = client(fake.url)
        assert len(asking.score("teacher", ROWS[1:], 4)) == 1 and asking.failures == 2


def test_the_pauses_grow() -> None:
    pauses: list[float] = []

    async def wait(seconds: float) -> None:
        pauses.append(seconds)

    with running(failing(9, 503)) as fake, mock.patch("asyncio.sleep", wait), pytest.raises(UserError):
        client_module.LONGEST_PAUSE = 30.0
        client(fake.url, retries=7).score("teacher", ROWS[1:], 4)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def refused(url: str, problem: str, **settings: Any) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=re.escape(f"teacher_server.url = {url!r}")) as caught:
        score(url, **settings)
    assert re.search(problem, str(caught.value)), caught.value
    assert "\n" not in str(caught.value) and time.monotonic() - began < 20


def test_a_server_that_stays_busy_is_one_error() -> None:
    with running(failing(99, 503)) as fake:
        refused(fake.url, r"failed 3 times, the last time with HTTP 503: busy: see whether the server runs")


def test_nobody_there_is_one_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(f"http://127.0.0.1:{port}", r"failed 3 times.*Cannot connect.*make serve-teacher")


def test_a_server_that_never_answers_does_not_hang() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused(f"http://127.0.0.1:{silent.getsockname()[1]}", r"teacher_server\.timeout = 0\.3 s", timeout=0.3)


def test_an_answer_that_comes_byte_by_byte_does_not_hang() -> None:
    """A timeout of each read alone would be renewed for ever."""

    class Dribble(bytes):
        def __new__(cls) -> Dribble:
            return super().__new__(cls, b" " * 10**6)

    def answer(path: str, body: Any) -> Answer:
        return 200, Dribble()

    with running(answer) as fake:
        write = fake.server.RequestHandlerClass.send_response

        def slow(handler: Any, *args: Any) -> None:
            write(handler, *args)
            sending = handler.wfile.write

            def one_by_one(content: bytes) -> None:
                for i in range(min(len(content), 400)):
                    sending(content[i : i + 1])
                    handler.wfile.flush()
                    time.sleep(0.02)

            handler.wfile = mock.Mock(write=one_by_one, flush=handler.wfile.flush)

        with mock.patch.object(fake.server.RequestHandlerClass, "send_response", slow):
            refused(fake.url, r"no whole answer within teacher_server\.timeout = 0\.5 s", timeout=0.5, retries=0)


STRANGE: list[tuple[Callable[[str, Any], Answer], str]] = [
    (lambda path, body: (200, b"<html>hello</html>"), "failed 3 times"),
    (lambda path, body: (200, {"hello": 1}), "not vLLM's"),
    (lambda path, body: (200, {"choices": [{"prompt_logprobs": None}]}), "not vLLM's"),
    (lambda path, body: (200, {"choices": [{"prompt_logprobs": [None]}]}), "1 positions for"),
    (lambda path, body: (200, {"choices": [{"prompt_logprobs": [None] * len(body["prompt"])}]}), "not vLLM's"),
    (
        lambda path, body: (200, {"choices": [{"prompt_logprobs": [{"2": {"logprob": -1}}] * len(body["prompt"])}]}),
        "no log-probability of token",
    ),
    (
        lambda path, body: (
            200,
            {"choices": [{"prompt_logprobs": [{str(i): {"logprob": 0.5} for i in range(10)}] * len(body["prompt"])}]},
        ),
        "log-probabilities above 0",
    ),
    (
        lambda path, body: (
            200,
            {"choices": [{"prompt_logprobs": [{i: {"logprob": math.nan} for i in "0359"}] * len(body["prompt"])}]},
        ),
        "log-probabilities above 0",
    ),
    (lambda path, body: (404, {"detail": "Not Found"}), "refuses POST /v1/completions with HTTP 404"),
    (lambda path, body: (401, b"who are you"), "HTTP 401: who are you"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "problem"), STRANGE)
def test_an_answer_that_is_none_is_one_error(answer: Callable[[str, Any], Answer], problem: str) -> None:
    with running(answer) as fake:
        refused(fake.url, problem)


def test_more_ids_than_the_server_gives_are_refused_with_the_setting() -> None:
    with running() as fake:
        refused(fake.url, r"greater than max allowed: 20.*--max-logprobs of at least teacher_server\.top_k", top_k=21)


def test_the_first_error_ends_the_other_requests() -> None:
    def answer(path: str, body: Any) -> Answer:
        if body["prompt"] == [1, 0]:
            return 401, b"no"
        time.sleep(0.5)
        return vllm(path, body)

    with running(answer) as fake:
        began = time.monotonic()
        with pytest.raises(UserError, match="HTTP 401"):
            client(fake.url, concurrency=1).score("teacher", [((1,), (i,)) for i in range(20)], 4)
        assert time.monotonic() - began < 5 and len(fake.asked) <= 3


def test_models_and_the_vocabulary_are_asked_for() -> None:
    with running() as fake:
        (model,) = client(fake.url).models()
        assert model == ("teacher", 64)
        assert not client(fake.url).refuses("teacher", VOCAB - 1) and client(fake.url).refuses("teacher", VOCAB)
    with running(lambda path, body: (200, [])) as fake, pytest.raises(UserError, match="not vLLM's"):
        client(fake.url).models()
