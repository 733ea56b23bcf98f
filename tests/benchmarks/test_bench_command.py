"""What a benchmark declares is what its command line takes. No benchmark runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import cli as bench
from benchmarks.common import BENCH, Out, Quick
from prune_opd.cli.main import app
from prune_opd.errors import ConfigError

CALLS: list[dict[str, Any]] = []


def declared(
    pairs: Annotated[list[str] | None, typer.Argument()] = None, out: Out = BENCH, quick: Quick = False, seeds: int = 3
) -> int:
    CALLS.append({"out": out, "quick": quick, "pairs": pairs, "seeds": seeds})
    return 7


@pytest.fixture(autouse=True)
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setitem(bench.BENCHMARKS, "declared", declared)


def test_arguments_and_options_in_any_order_reach_the_benchmark_and_its_exit_code_comes_back() -> None:
    answer = CliRunner().invoke(app, ["bench", "declared", "one", "--seeds", "5", "two", "--out", "there", "--quick"])
    assert answer.exit_code == 7
    (call,) = CALLS
    assert call == {"out": Path("there"), "quick": True, "pairs": ["one", "two"], "seeds": 5}


def test_what_is_left_out_has_the_benchmarks_own_default() -> None:
    assert bench.run_benchmark(["declared"]) == 7
    assert CALLS[0]["out"] == Path("bench")
    assert (CALLS[0]["quick"], CALLS[0]["seeds"], CALLS[0]["pairs"] or None) == (False, 3, None)


@pytest.mark.parametrize("arguments", [["declared", "--sed", "5"], ["loss", "extra"], []])
def test_what_no_benchmark_declares_is_a_usage_error(arguments: list[str]) -> None:
    answer = CliRunner().invoke(app, ["bench", *arguments])
    assert answer.exit_code == 2
    assert not CALLS


def test_help_names_every_benchmark_and_its_own_options() -> None:
    listed = CliRunner().invoke(app, ["bench", "--help"]).output
    assert all(name in listed for name in bench.BENCHMARKS)
    assert "--seeds" in CliRunner().invoke(app, ["bench", "declared", "--help"]).output


def test_unknown_benchmark_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no benchmark 'declred': did you mean 'declared'"):
        bench.run_benchmark(["declred"])
