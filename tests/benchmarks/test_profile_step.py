"""The table of docs/pace.md by function (scripts/profile_step.py): what is counted, and that it is still there."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import time
from pathlib import Path

import pytest

from scripts.profile_step import ROWS, STEP, Function, Samples


@pytest.mark.parametrize("function", [*ROWS, STEP], ids=lambda function: function.label)
def test_every_function_of_the_table_is_in_its_file(function: Function) -> None:
    """A library that calls one otherwise would leave its row out in silence."""
    package, _, path = function.file.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / path).read_text(encoding="utf-8")
    assert re.search(rf"^ *def {re.escape(function.name)}\(", text, re.MULTILINE)


def test_shares_are_those_of_the_step_with_callees() -> None:
    samples = Samples()
    samples.seconds.update(
        {
            ("/here/prune_opd/loop.py", "step"): 400,
            ("/there/vllm/v1/engine/llm_engine.py", "step"): 300,
            ("/there/vllm/model_executor/layers/linear.py", "apply"): 60,
            ("/there/vllm/v1/layers/linear.py", "apply"): 40,
            ("/here/prune_opd/megatron/layout.py", "step"): 900,
        }
    )
    shares = {function.label: samples.share(function) for function in ROWS}
    assert shares["vLLM: an engine step"] == 0.75 and shares["– – linear layers"] == 0.15
    assert shares["teacher"] is None


def _longer() -> None:
    _busy(0.3)


def _busy(seconds: float, depth: int = 3) -> None:
    """A function that calls itself: it counts once a look."""
    if depth:
        return _busy(seconds, depth - 1)
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return None


def test_looks_follow_the_cpu_time() -> None:
    samples = Samples()
    with samples.taken():
        _longer()
        time.sleep(0.3)  # no CPU time, no look
        _busy(0.1)
    busy, longer = samples.seconds[__file__, "_busy"], samples.seconds[__file__, "_longer"]
    assert 0.9 * samples.whole <= busy <= samples.whole
    assert 0.65 < longer / busy < 0.85


def _in_c() -> None:
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 400_000)  # one call, a tenth of a second or more


def test_a_long_call_into_c_has_its_whole_time() -> None:
    samples, before = Samples(), time.process_time()
    with samples.taken():
        _in_c()
        taken = time.process_time() - before
        _busy(taken)
    assert 0.4 < samples.seconds[__file__, "_in_c"] / samples.whole < 0.6
