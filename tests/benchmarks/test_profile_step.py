"""The table of docs/pace.md by function (scripts/profile_step.py): what is counted, and that it is still there."""

from __future__ import annotations

import cProfile
import importlib.util
import pstats
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.profile_step import ROWS, STEP, Function, shares


@pytest.mark.parametrize("function", [*ROWS, STEP], ids=lambda function: function.label)
def test_every_function_of_the_table_is_in_its_file(function: Function) -> None:
    """A library that calls one otherwise would leave its row out in silence."""
    package, _, path = function.file.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / path).read_text(encoding="utf-8")
    assert re.search(rf"^ *def {re.escape(function.name)}\(", text, re.MULTILINE)


def test_shares_are_those_of_the_step_with_callees() -> None:
    def entry(calls: int, seconds: float) -> tuple[Any, ...]:
        return calls, calls, 0.0, seconds, {}

    stats = {
        ("/here/prune_opd/loop.py", 60, "step"): entry(1, 4.0),
        ("/there/vllm/v1/engine/llm_engine.py", 319, "step"): entry(96, 3.0),
        ("/there/vllm/model_executor/layers/linear.py", 229, "apply"): entry(5, 0.5),
        ("/there/vllm/model_executor/layers/linear.py", 400, "apply"): entry(2, 0.5),
        ("/here/prune_opd/megatron/layout.py", 1, "step"): entry(1, 9.0),
    }
    assert shares(stats) == [("vLLM: an engine step", 96, 0.75), ("– – linear layers", 7, 0.25)]


def test_a_profile_of_python_has_that_form() -> None:
    profile = cProfile.Profile()
    profile.enable()
    re.compile("a step")
    profile.disable()
    stats: Any = pstats.Stats(profile)
    assert all(len(key) == 3 and len(value) == 5 for key, value in stats.stats.items())
