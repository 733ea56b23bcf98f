"""`prune-opd bench peers` without TRL, which `make test` does not install: turns, records, comparison, refusal."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.peers import command as peers
from benchmarks.peers.trl import learning_rate_factor, prompt_rows
from benchmarks.peers.turns import Contest
from prune_opd.config import OptimizerConfig
from prune_opd.config.yaml import config_differences
from prune_opd.data.ledger import save_tokenizer
from prune_opd.data.prompts import make_sampler
from prune_opd.errors import UserError


def step(number: int, wall: float, tokens: int) -> dict[str, Any]:
    return {"step": number, "wall_s": wall, "cpu_s": 2 * wall, "peak_bytes": 100 * number, "tokens": tokens}


def measured(seconds: float) -> dict[str, Any]:
    return peers.summarise([step(1, 100.0, 10), step(2, seconds, 30), step(3, seconds, 50)], warmup=1)


def accuracy(value: float) -> dict[str, float]:
    return {"accuracy": value, "stderr": 0.01, "response_length": 100.0}


ACCURACIES = {"student": accuracy(0.1), **{f"{name}/3": accuracy(0.5) for name in ("ours_opd", "trl", "ours_prune")}}


def all_measured(ours: float, trl: float, one_process: float) -> dict[str, Any]:
    seconds = {"ours_opd": ours, "trl": trl, "ours_prune": ours, "trl_one_process": one_process}
    return {name: measured(value) for name, value in seconds.items()}


def test_without_trl_the_error_names_the_target_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "has_trl", lambda: False)
    with pytest.raises(UserError, match="make setup-bench"):
        peers.run(tmp_path / "bench", quick=True)
    assert not (tmp_path / "bench").exists()


def test_the_warm_up_is_in_no_rate_but_its_tokens_count_as_spent() -> None:
    row = measured(2.0)
    assert row["tokens_per_s"] == 80 / 4
    assert row["cpu_s_per_1000_tokens"] == 1000 * 8 / 80
    assert row["timed_steps"] == 2
    assert row["peak_bytes"] == 300
    assert row["tokens_so_far"] == {"1": 10, "2": 40, "3": 90}


@pytest.mark.parametrize(("ours", "reached"), [(2.0, True), (2.1, False)])
def test_the_verdict_is_against_the_faster_of_trls_layouts(ours: float, reached: bool) -> None:
    for trl, other in ((3.0, 5.0), (5.0, 3.0)):
        result = peers.compare(all_measured(ours, trl, other), ACCURACIES)
        assert result["best_trl"] == ("trl" if trl < other else "trl_one_process")
        assert [target["reached"] for target in result["targets"]] == [reached]


def test_trl_has_learned_only_beyond_the_noise() -> None:
    for last, learned in ((0.13, False), (0.5, True)):
        result = peers.compare(all_measured(2, 3, 5), {**ACCURACIES, "trl/3": accuracy(last)})
        assert result["trl_learned"] is learned


def test_accuracy_at_equal_tokens_lies_on_the_line_between_evaluations() -> None:
    curve = [{"tokens": tokens, "accuracy": value} for tokens, value in ((0, 0.1), (100, 0.5), (200, 0.6))]
    assert peers.accuracy_at(curve, 50) == pytest.approx(0.3)
    assert peers.accuracy_at(curve, 150) == pytest.approx(0.55)
    assert peers.accuracy_at(curve, 200) == peers.accuracy_at(curve, 300) == 0.6


def test_turns_begin_with_the_warm_up_and_end_with_the_last_step() -> None:
    assert peers.turn_ends(peers.Settings(steps=20, warmup=2, turn=6)) == [2, 8, 14, 20]
    assert peers.turn_ends(peers.Settings(steps=9, warmup=1, turn=5)) == [1, 6, 9]


CONTENDER = """
from pathlib import Path
from benchmarks.common import answer
from benchmarks.peers.turns import Turns

def train(folder, steps, fail_at):
    turns = Turns(Path(folder))
    for step in range(1, steps + 1):
        turns.begin(step)
        Path(folder, "begun").write_text(str(step))
        assert step != fail_at, "it broke"
        turns.end(step, tokens=7)
        Path(folder, "saved").write_text(str(step))
    return turns.steps

answer(train)
"""


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    (tmp_path / "a_contender.py").write_text(CONTENDER)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, str(Path(peers.__file__).parents[2])]))

    def start(pool: ThreadPoolExecutor, steps: int, fail_at: int = 0) -> Any:
        request = {"folder": str(tmp_path), "steps": steps, "fail_at": fail_at}
        return closing(Contest(pool, "one", "a_contender", tmp_path, ranks=None, request=request))

    return start


def test_a_contender_goes_on_to_the_end_of_its_turn_and_waits(contest: Callable[..., Any], tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool, contest(pool, steps=3) as one:
        one.wait_for(1)
        assert not (tmp_path / "begun").exists()
        for last in (2, 3):
            one.go_on(last)
            assert (tmp_path / "begun").read_text() == (tmp_path / "saved").read_text() == str(last)
        for step, (record,) in enumerate(one.steps(), 1):
            assert record["step"] == step
            assert record["tokens"] == 7 and record["wall_s"] >= 0 and record["peak_bytes"] > 0
        assert len(one.steps()) == 3


def test_a_contender_that_fails_ends_the_benchmark_with_its_last_words(contest: Callable[..., Any]) -> None:
    with ThreadPoolExecutor() as pool, contest(pool, steps=3, fail_at=2) as one:
        one.wait_for(1)
        with pytest.raises(UserError, match=r"contender one failed with exit code 1.*it broke"):
            one.go_on(2)


def test_contenders_that_wait_end_with_the_benchmark(contest: Callable[..., Any], tmp_path: Path) -> None:
    """The pool waits for its threads, and they wait for the contenders: this would never end otherwise."""
    with ThreadPoolExecutor() as pool, contest(pool, steps=3) as one:
        one.wait_for(1)
        one.go_on(1)
    assert (tmp_path / "begun").read_text() == "1"


def test_a_step_is_as_slow_as_its_slowest_rank_and_costs_all_of_them() -> None:
    ranks = (step(1, 1.0, 10), step(1, 3.0, 10))
    (found,) = peers.join_ranks([ranks], None)
    assert found == {"step": 1, "wall_s": 3.0, "cpu_s": 8.0, "peak_bytes": 200, "tokens": 20}
    (ours,) = peers.join_ranks([ranks], [{"tokens_generated": 12, "time_sync": 0.5}])
    assert (ours["tokens"], ours["time_sync"]) == (12, 0.5)


def test_trls_learning_rate_is_the_one_that_our_optimizer_has() -> None:
    from prune_opd import platform

    platform.prepare()
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = OptimizerConfig(lr=3e-4, min_lr=3e-5, schedule="linear", warmup_steps=4)
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    # fmt: off
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=settings.lr, min_lr=settings.min_lr, lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=10, lr_decay_style="linear", start_wd=0.0, end_wd=0.0, wd_incr_steps=10,
        wd_incr_style="constant",
    )
    # fmt: on
    for update in range(10):
        schedule.step(1)
        expected = optimizer.param_groups[0]["lr"]
        assert settings.lr * learning_rate_factor(settings, 10, update) == pytest.approx(expected, rel=1e-9)


def test_trl_gets_the_prompts_of_our_sampler_in_its_order(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = peers.make_config(peers.CONTENDERS[0], peers.QUICK)
    rows = prompt_rows(config, tokenizer, steps=2)
    sampler = make_sampler(config.data, tokenizer, config.seed)
    drawn = sampler.next(config.rollout.prompts) + sampler.next(config.rollout.prompts)
    assert [tuple(tokenizer(row["prompt"])["input_ids"]) for row in rows] == [prompt.ids for prompt in drawn]


def test_contenders_differ_only_in_what_the_table_compares() -> None:
    configs = {contender.name: peers.make_config(contender, peers.Settings()) for contender in peers.CONTENDERS}
    full, prune, eager = configs["ours_opd"], configs["ours_prune"], configs["ours_eager"]
    assert configs["trl"] == configs["trl_one_process"] == eager, "TRL does not look at how our engine runs"
    assert config_differences(eager, full) == ["rollout.enforce_eager: null → false"]
    assert (full.horizon.strategy, full.gate) == ("full", None)
    assert prune.horizon.strategy == "prune"
    assert (prune.rollout, prune.optimizer, prune.data, prune.seed) == (
        full.rollout,
        full.optimizer,
        full.data,
        full.seed,
    )


def test_the_tables_show_rates_accuracies_and_the_verdict() -> None:
    result = {
        "recipe": "tiny",
        "settings": {"steps": 3, "warmup": 1, "turn": 1, "problems": 8},
        "environment": {"cpus": 2, "load_average_before": [0.5], "load_average_after": [1.5]},
        "contenders": all_measured(2.1, 3, 5),
    }
    result |= peers.compare(result["contenders"], ACCURACIES)
    out = io.StringIO()
    peers.print_result(result, Console(file=out, width=160))
    text = out.getvalue()
    assert "÷ trl" in text and "trl_one_process" in text and "50.0% ± 1.0%" in text
    assert "miss  tokens per second, ours_opd / trl: 1.43 (≥ 1.5)" in text
