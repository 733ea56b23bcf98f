"""The step loop without ranks and without vLLM: whom it stops in which order, and what it says at a meeting."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np

from prune_opd.process import watch
from prune_opd.rollout.engine import _told
from prune_opd.rollout.request import NOTHING
from prune_opd.rollout.stepwise import StepLoop, _due_rows, _report

TOP, LOOK = 32, 200


class Engine:
    """Gives every request a token a step, with the log-probabilities of TOP others, and remembers what is stopped."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.stopped: list[list[str]] = []

    def add_request(self, name: str, prompt: Any, params: Any) -> str:
        self.running.append(f"{name}-abc")
        return self.running[-1]

    def step(self) -> list[Any]:
        logprobs = SimpleNamespace(token_ids=list(range(TOP + 1)), logprobs=[-0.5] * (TOP + 1))
        completion = SimpleNamespace(token_ids=[7], logprobs=logprobs, finish_reason=None)
        return [SimpleNamespace(request_id=name, outputs=[completion], finished=False) for name in self.running]

    def abort_request(self, names: list[str], internal: bool) -> None:
        assert internal
        self.stopped.append(names)
        self.running = [name for name in self.running if name not in names]


def loop_at_its_look(rows: list[int], racing: bool = False) -> tuple[Engine, StepLoop]:
    engine = Engine()
    loop = StepLoop(engine, (LOOK,), racing=racing)
    for row in rows:
        loop.add(row, (1, 2), None, 2 * LOOK, NOTHING)
    loop.advance()
    return engine, loop


def test_requests_are_stopped_one_a_call_in_the_order_of_their_rows() -> None:
    """vLLM goes through the names of one call as a set: the ranks of an engine would free blocks in other orders."""
    engine, loop = loop_at_its_look([9, 4, 30, 1])
    loop.stop([30, 9, 1, 4], {1, 9, 30})
    assert engine.stopped == [["1-abc"], ["9-abc"], ["30-abc"]]
    loop.give_up()
    assert engine.stopped[3:] == [["4-abc"]]


def test_only_the_rank_that_speaks_for_its_engine_brings_tokens_and_nobody_brings_arrays() -> None:
    rows = list(range(20))
    _, loop = loop_at_its_look(rows)
    mine = loop.due(holder=0)
    assert [prefix.top_ids_TK.shape for prefix in mine if prefix.top_ids_TK is not None] == [(LOOK, TOP)] * len(rows)
    speaker = pickle.dumps(_report(loop, 0, None, mine))
    other = pickle.dumps(_report(loop, 0, None))
    assert len(other) < 300, "how it is: the same whatever has been generated"
    assert len(speaker) < len(rows) * (4 * LOOK + 40) + 300, "four bytes a token"
    assert len(pickle.dumps(mine)) > 30 * len(speaker), "what every rank has brought before"


def test_what_the_engines_have_due_is_put_together_by_row_with_the_rank_that_holds_the_arrays() -> None:
    _, first = loop_at_its_look([3, 0])
    _, second = loop_at_its_look([2, 1])
    own, theirs = first.due(holder=0), second.due(holder=2)
    due = _due_rows([_report(first, 0, None, own), _report(second, 1, None, theirs)], own, ranks_per_engine=2)
    assert [(prefix.row, prefix.holder) for prefix in due] == [(0, 0), (1, 2), (2, 2), (3, 0)]
    assert all(prefix.new_ids == (7,) * LOOK for prefix in due)
    assert [prefix.top_ids_TK is not None for prefix in due] == [True, False, False, True]
    arrays = due[0].top_logp_TK
    assert arrays is not None and np.array_equal(arrays, np.full((LOOK, TOP), -0.5, np.float32))


def test_a_rank_that_has_failed_brings_its_error_alone() -> None:
    _, loop = loop_at_its_look([0, 1])
    report = _report(loop, 0, "RuntimeError: gone", loop.due(0), {0: 5})
    assert (report.error, report.due, report.done, report.idle) == ("RuntimeError: gone", [], {}, True)


def test_the_loop_says_how_far_its_responses_are() -> None:
    said: list[str] = []
    watch(lambda describe: said.append(describe()))
    try:
        loop_at_its_look([0, 1])
    finally:
        watch(None)
    assert said[0] == "0/2 responses, 2 tokens"
    assert said[-1] == f"0/2 responses, {2 * LOOK:,} tokens"


def test_an_engine_of_vllm_says_how_far_it_is_and_is_left_as_it_was() -> None:
    class Ending:
        under_way = SimpleNamespace(detokenizer=SimpleNamespace(num_output_tokens=lambda: 20))
        output_processor = SimpleNamespace(request_states={"3": under_way})

        def step(self) -> list[Any]:
            return [SimpleNamespace(finished=True, outputs=[SimpleNamespace(token_ids=[7] * 1500)])]

    engine, said = Ending(), []
    watch(lambda describe: said.append(describe()))
    try:
        with _told(engine, 4):
            engine.step()
            engine.step()
    finally:
        watch(None)
    assert said == ["1/4 responses, 1,520 tokens", "2/4 responses, 3,020 tokens"]
    assert "step" not in vars(engine)
    with _told(engine, 4):  # nobody watches
        assert "step" not in vars(engine)
