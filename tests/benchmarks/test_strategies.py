"""The comparison of strategies: its methods, order, resuming and arithmetic; and one quick real run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from benchmarks.strategies.charts import write_charts
from benchmarks.strategies.plan import (
    METHODS,
    Method,
    RunSpec,
    Settings,
    choose,
    method_config,
    pair_recipe,
    plan,
    run_config,
    sweep_plan,
)
from benchmarks.strategies.rank import FewerBetween, Replay, Wanted, scattered
from benchmarks.strategies.results import (
    Verdict,
    markdown,
    mean_and_error,
    pair_rows,
    run_numbers,
    stop_verdicts,
    truncation_at,
    verdicts,
)
from benchmarks.strategies.runs import Result, finished, records_of, run_all
from prune_opd.config import HorizonConfig, TrainConfig
from prune_opd.config.paths import recipes_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import config_differences
from prune_opd.errors import ConfigError, UserError
from prune_opd.eval.evaluate import Evaluator
from prune_opd.track.metrics import FILE_NAME, read_metrics
from tests.forked.command import run_command

PAIRS = [name for name in ("tiny_compatible", "tiny_drift") if (recipes_dir() / f"{name}.py").exists()]
SEEDS = [1001, 1002, 1003]
QUIET = Console(quiet=True)


def recipe(pair: str = "tiny_compatible") -> TrainConfig:
    config = load_recipe(pair)
    assert isinstance(config, TrainConfig)
    return config


# ---------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_differs_from_full_opd_in_what_it_names_only(pair: str, method: Method) -> None:
    full = run_config(recipe(pair), METHODS[0], 1001, Settings())
    other = run_config(recipe(pair), method, 1001, Settings())
    changed = {line.partition(":")[0] for line in config_differences(full, other)} - {"name"}
    named = {change.partition("=")[0] for change in method.changes}
    assert {name.partition("[")[0] for name in changed} - named == set()
    # Only what the recipe happens to have already may be missing.
    assert named - changed <= {"horizon.rho"}  # the recipe may have it already


def test_full_opd_weighs_every_token_one_and_keeps_what_it_measures_with() -> None:
    own, full = recipe(), method_config(recipe(), METHODS[0])
    assert own.gate is not None and full.gate is not None
    assert full.horizon.strategy == "full"
    assert (full.gate.w_drop, full.gate.w_base) == (0, 0)
    assert (full.gate.k, full.gate.threshold) == (own.gate.k, own.gate.threshold)


def test_all_methods_of_a_seed_share_data_problems_and_length_and_no_file_but_their_metrics() -> None:
    specs = plan({"tiny_compatible": recipe()}, choose(None), SEEDS, Settings())
    for seed in SEEDS:
        shared = {
            json.dumps([spec.config.seed, spec.config.steps, str(spec.config.evaluation), str(spec.config.data)])
            for spec in specs
            if spec.seed == seed
        }
        assert len(shared) == 1
    assert all(spec.config.evaluation.seed != recipe().evaluation.seed for spec in specs)
    assert not any(spec.config.checkpoint.last or spec.config.track.report for spec in specs)


def test_a_method_that_does_not_exist_is_refused_and_a_control_brings_what_it_replays() -> None:
    with pytest.raises(ConfigError, match="--methods 'prun' is not known: the methods are full"):
        choose(["prun"])
    assert [method.name for method in choose(["random"])] == ["full", "prune", "random"]
    assert [method.name for method in choose(["inflight_full"])] == ["full", "full_gated", "inflight_full"]
    assert not {"full_gated", "inflight_full"} & {method.name for method in choose(None)}


def test_random_limits_are_refused_where_the_shortest_would_be_kept() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.oversample = 1\.5 with the method random"):
        plan({"p": pair_recipe("tiny_compatible", ["rollout.oversample=1.5"])}, choose(["random"]), SEEDS, Settings())


def test_settings_of_the_command_line_hold_for_every_method() -> None:
    changed = pair_recipe("tiny_compatible", ["rollout.prompts=5", "optimizer.clip_grad=2.0"])
    for spec in plan({"p": changed}, choose(None), SEEDS[:1], Settings()):
        assert (spec.config.rollout.prompts, spec.config.optimizer.clip_grad) == (5, 2.0)


def test_methods_take_turns_over_pairs_and_seeds_and_controls_come_after_what_they_replay() -> None:
    pairs = {"one": recipe(), "two": recipe()}
    specs = plan(pairs, choose(None), SEEDS, Settings())
    assert len(specs) == 2 * 3 * len(choose(None)) == len({spec.key for spec in specs})
    assert [spec.pair for spec in specs[:4]] == ["one", "two", "one", "two"]
    first = [next(spec.method.name for spec in specs if spec.seed == seed) for seed in SEEDS]
    assert len(set(first)) == 3
    place = {spec.key: i for i, spec in enumerate(specs)}
    for spec in specs:
        if spec.method.replays:
            assert place[f"{spec.pair}/{spec.method.against}/{spec.seed}"] < place[spec.key]


@pytest.mark.parametrize("pair", PAIRS)
def test_sweeps_run_each_gate_once_and_the_recipes_own_not_again(pair: str) -> None:
    gate = recipe(pair).gate
    assert gate is not None
    specs = sweep_plan(pair, recipe(pair), SEEDS[:1], Settings())
    gates = [(spec.config.gate.k, spec.config.gate.threshold) for spec in specs if spec.config.gate]
    wanted = {(8, threshold) for threshold in (0.3, 0.5, 0.7, 0.9)} | {(k, gate.threshold) for k in (2, 4, 8, 16)}
    assert sorted(gates) == sorted(wanted - {(gate.k, gate.threshold)})
    own = run_config(recipe(pair), choose(["prune"])[1], SEEDS[0], Settings())
    for spec in specs:
        changed = {line.partition(":")[0] for line in config_differences(own, spec.config)} - {"name"}
        assert changed <= {"gate.k", "gate.threshold"}


# ---------------------------------------------------------------------------------------------------- running


class Fake:
    """Stands in for a process: writes what a run leaves behind, at once."""

    def __init__(self, fail: str | None = None) -> None:
        self.started: list[str] = []
        self.windows: dict[str, tuple[int, ...]] = {}
        self.fail = fail

    def __call__(self, spec: RunSpec, wanted: Wanted, where: Path, core: int) -> Any:
        self.started.append(spec.key)
        self.windows[spec.key] = wanted.windows
        code = 1 if spec.key == self.fail else 0
        where.mkdir(parents=True, exist_ok=True)
        wanted.write(where)
        if code:
            (where / "log.txt").write_text("x\nerror: it broke\n")
        else:
            write_metrics(where / FILE_NAME, wanted.config.steps, horizon=10 * spec.seed)
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])


def write_metrics(path: Path, steps: int, horizon: int = 100, accuracy: float = 0.5) -> None:
    lines: list[dict[str, Any]] = [evaluation(0, 0.1)]
    lines += [step(number, horizon + number) for number in range(1, steps + 1)]
    path.write_text("\n".join(json.dumps(line) for line in [*lines, evaluation(steps, accuracy)]) + "\n")


def evaluation(number: int, accuracy: float) -> dict[str, Any]:
    return {"step": number, "eval_ledger": accuracy, "eval_ledger_stderr": 0.02, "eval_response_length": 150.0}


def step(number: int, horizon: int, tokens: int = 100, seconds: float = 1.0) -> dict[str, Any]:
    phases = ("sync", "rollout", "teacher", "train", "step")
    times = {f"{kind}_{phase}": seconds for kind in ("time", "cpu") for phase in phases}
    position = {"overlap": 0.8, "event_rate": 0.1, "overlap_by_position": [0.9, None]}
    return {
        "step": number,
        "horizon": horizon,
        "tokens_generated": tokens,
        "tokens_trained": tokens,
        "response_length": tokens / 10,
        "reliable_length": tokens / 10,
        **position,
        **times,
    }


SMALL = Settings(steps=2)


def small_plan(*names: str) -> list[RunSpec]:
    return plan({"tiny_compatible": recipe()}, choose(names), SEEDS[:2], SMALL)


def test_a_finished_run_is_not_repeated_and_another_config_is(tmp_path: Path) -> None:
    specs, fake = small_plan("topd_25"), Fake()
    results = run_all(specs, tmp_path, 1, QUIET, fake)
    assert fake.started == [spec.key for spec in specs] == [spec.key for spec, _, _ in results]
    again = Fake()
    run_all(specs, tmp_path, 1, QUIET, again)
    assert again.started == []
    (tmp_path / specs[0].key / FILE_NAME).write_text("")  # cut off
    longer = [replace(specs[1], config=replace(specs[1].config, steps=3))]
    run_all([specs[0], *longer, *specs[2:]], tmp_path, 1, QUIET, again)
    assert again.started == [specs[0].key, specs[1].key]


def test_controls_replay_the_windows_of_the_run_with_their_seed(tmp_path: Path) -> None:
    fake = Fake()
    run_all(small_plan("replay", "random"), tmp_path, 1, QUIET, fake)
    for seed in SEEDS[:2]:
        for control in ("replay", "random"):
            assert fake.windows[f"tiny_compatible/{control}/{seed}"] == (10 * seed + 1, 10 * seed + 2)


def test_a_run_with_other_windows_limits_or_problems_is_another_run(tmp_path: Path) -> None:
    wanted = Wanted(recipe(), 4, (30, 50), scatter=True)
    wanted.write(tmp_path)
    assert Wanted.read(tmp_path) == wanted
    for change in ({"windows": (30,)}, {"scatter": False}, {"problems_between": 5}):
        assert Wanted.read(tmp_path) != replace(wanted, **change)


def test_a_run_that_fails_ends_the_benchmark_with_its_last_words_and_keeps_what_is_finished(tmp_path: Path) -> None:
    specs = small_plan("topd_25")
    with pytest.raises(
        UserError, match=r"run tiny_compatible/topd_25/1001 failed with exit code 1 .*: error: it broke"
    ):
        run_all(specs, tmp_path, 1, QUIET, Fake(fail="tiny_compatible/topd_25/1001"))
    assert finished(Wanted(specs[0].config, specs[0].problems_between), tmp_path / specs[0].key)
    assert [spec.key for spec in specs if records_of(spec, specs, tmp_path)] == [specs[0].key]


# ---------------------------------------------------------------------------------------------------- one run


def replaying(*windows: int) -> Replay:
    return Replay(HorizonConfig(strategy="full", max_len=100, min_len=1), windows)


def test_replay_gives_the_windows_in_their_order_and_keeps_the_last() -> None:
    controller, seen = replaying(30, 50, 400), []
    for _ in range(4):
        seen.append(controller.horizon)
        controller.update([1], [2], [True])
    assert seen == [30, 50, 100, 100]


def test_a_restored_replay_goes_on_where_it_was() -> None:
    first, second = replaying(30, 50, 70), replaying(30, 50, 70)
    first.update([], [], [])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.horizon == 50


def test_scattered_limits_have_the_horizon_as_their_mean_and_stay_between_one_and_max_len() -> None:
    draw = scattered(max_len=100, seed=0)
    for horizon, low, high in ((30, 1, 59), (80, 60, 100), (100, 100, 100), (1, 1, 1)):
        limits = draw(horizon, 20_000, 1)
        assert (min(limits), max(limits)) == (low, high)
        assert sum(limits) / len(limits) == pytest.approx(horizon, abs=0.5)


def test_scattered_limits_are_the_same_for_the_same_seed_and_step_only() -> None:
    first = scattered(100, seed=3)(50, 32, 7)
    assert first == scattered(100, seed=3)(50, 32, 7)
    assert first != scattered(100, seed=3)(50, 32, 8)
    assert first != scattered(100, seed=4)(50, 32, 7)


def test_only_the_last_evaluation_takes_all_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "run", lambda self, engine: len(self.problems))
    whole = Evaluator(None, "t", cast(Any, None), cast(Any, range(8)), cast(Any, None))
    steps = iter([False, False, True])
    evaluator = FewerBetween(whole, 3, lambda: next(steps))
    assert [evaluator.run(cast(Any, None)) for _ in range(3)] == [3, 3, 8]


# ---------------------------------------------------------------------------------------------------- results


def results(pair: str, **methods: tuple[list[float], int, float, int]) -> list[Result]:
    """Synthetic runs: method → (accuracy of every seed, tokens a step, seconds a phase and step, last window)."""
    known = {method.name: method for method in METHODS}
    return [
        (
            RunSpec(pair, known[name], seed, recipe(), problems_between=4),
            [step(1, window, tokens, seconds), step(2, window, tokens, seconds)],
            [evaluation(0, 0.1), evaluation(2, accuracy)],
        )
        for name, (accuracies, tokens, seconds, window) in methods.items()
        for seed, accuracy in zip(SEEDS, accuracies, strict=True)
    ]


def rows(pair: str, **methods: tuple[list[float], int, float, int]) -> list[dict[str, Any]]:
    return pair_rows(pair, METHODS, results(pair, **methods))


def test_a_row_has_means_standard_errors_over_seeds_and_savings_against_full() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    assert mean_and_error([1.0]) == (1.0, None)
    full, prune = rows("p", full=([0.5, 0.6, 0.7], 100, 1.0, 216), prune=([0.5, 0.5, 0.5], 60, 0.5, 100))
    assert (full["accuracy"], full["accuracy_stderr"]) == (pytest.approx(0.6), pytest.approx(0.1 / 3**0.5))
    assert (full["tokens_generated"], full["cpu_s"], full["saved_cpu_s"]) == (200, 6.0, 0)  # sync is not counted
    assert (prune["saved_tokens_generated"], prune["saved_cpu_s"]) == (pytest.approx(0.4), pytest.approx(0.5))
    assert prune["phases_cpu_s"] == {"sync": 1.0, "rollout": 1.0, "teacher": 1.0, "train": 1.0}
    assert prune["runs"][0]["curve"][-1] == {"step": 2, "accuracy": 0.5, "tokens": 120, "cpu_s": 3.0}


def test_gaps_are_taken_seed_by_seed_against_full_opd_and_against_what_a_control_replays() -> None:
    runs = results("p", full=([0.5, 0.6, 0.7], 100, 1.0, 216), prune=([0.52, 0.64, 0.72], 60, 0.5, 100))
    runs += [run for run in results("p", replay=([0.5, 0.6, 0.0], 60, 0.5, 100)) if run[0].seed != 1003]
    full, prune, replay = pair_rows("p", METHODS, runs)
    assert full["gaps"] == {}
    # 2, 4 and 2 points: known to 0.7 of a point, though the accuracies spread by ten.
    assert prune["gaps"] == {"full": (pytest.approx(0.08 / 3), pytest.approx(0.02 / 3))}
    assert replay["gaps"] == {"full": (0, 0), "prune": (pytest.approx(-0.03), pytest.approx(0.01))}
    alone = pair_rows("p", METHODS, [run for run in runs if run[0].method.name == "prune"])
    assert alone[0]["gaps"] == {}
    text = markdown("p", [full, prune, replay], [], [])
    assert "| +2.7 ± 0.7 |" in text and "| 60.0% ± 5.8 | – |" in text


def test_tokens_that_an_in_flight_stop_threw_away_were_generated_too() -> None:
    steps = [step(1, 216) | {"tokens_dropped": 7}, step(2, 216)]
    numbers = run_numbers(steps, [evaluation(0, 0.1), evaluation(2, 0.5)])
    assert numbers["tokens_generated"] == numbers["curve"][-1]["tokens"] == 207
    assert numbers["tokens_trained"] == 200


@pytest.mark.parametrize(
    ("accuracy", "tokens", "seconds", "reached"),
    [
        (0.60, 60, 0.6, [True, True, True, True]),
        (0.60, 63, 0.7, [False, False, True, True]),
        (0.55, 60, 0.6, [True, True, True, False]),  # within a standard error of full, below the fixed windows
        (0.52, 60, 0.6, [True, True, False, False]),
    ],
)
def test_verdicts_of_a_drift_pair(accuracy: float, tokens: int, seconds: float, reached: list[bool]) -> None:
    found = rows(
        "x_drift",
        full=([0.5, 0.6, 0.7], 100, 1.0, 216),
        topd_25=([0.56] * 3, 25, 0.3, 54),
        prune=([accuracy] * 3, tokens, seconds, 90),
    )
    assert [verdict.reached for verdict in verdicts("x_drift", 216, found)] == reached


@pytest.mark.parametrize(
    ("accuracy", "tokens", "window", "reached"),
    [
        (0.60, 100, 216, [True, True, True]),
        (0.60, 106, 200, [False, False, True]),
        (0.40, 100, 216, [True, True, False]),
    ],
)
def test_verdicts_of_a_compatible_pair(accuracy: float, tokens: int, window: int, reached: list[bool]) -> None:
    found = rows("x", full=([0.5, 0.6, 0.7], 100, 1.0, 216), prune=([accuracy] * 3, tokens, 1.0, window))
    judged = verdicts("x", 216, found)
    assert [verdict.reached for verdict in judged] == reached
    assert [str(verdict).startswith("reached") for verdict in judged] == reached


# The in-flight stop, against the same method without it.


def stopping(on: tuple[int, float, float], off: tuple[int, float, float], accuracies: list[float]) -> list[Verdict]:
    """(tokens a step, reliable length, seconds) with and without; ten responses, and a warm-up ten times as long."""
    runs = results("p", full=([0.3] * 3, 100, 1.0, 216), prune=([0.30, 0.31, 0.32], 100, 1.0, 216))
    runs += results("p", inflight=(accuracies, 100, 1.0, 216))
    for spec, steps, _ in runs:
        tokens, reliable, seconds = on if spec.method.name == "inflight" else off
        for record, factor in zip(steps, (10, 1), strict=True):
            record |= {"tokens_generated": tokens, "tokens_trained": tokens, "response_length": tokens / 10}
            record |= {"reliable_length": reliable, "time_step": seconds * factor, "cpu_step": 2 * seconds * factor}
            record |= {"pruned_inflight": 4 if spec.method.name == "inflight" else 0}
    found = pair_rows("p", METHODS, runs)
    text = markdown("p", found, [], [])
    assert "| a step | prune | inflight |" in text and "| responses stopped | 0.0 | 4.0 |" in text
    assert found[1]["step"]["cpu_s"] == 2 * off[2]  # without the warm-up
    by_name = {row["method"]: row for row in found}
    return stop_verdicts("p", by_name["prune"], by_name["inflight"])


def test_the_stop_of_a_pair_that_drifts_must_cut_its_tail_and_be_faster() -> None:
    """70 of 100 tokens of a response are beyond the reliable length; with the stop 20 are."""
    found = stopping((500, 30, 6.0), (1000, 30, 8.0), [0.30, 0.31, 0.32])
    assert [verdict.reached for verdict in found] == [True] * 4
    assert [verdict.numbers for verdict in found][:3] == [f"{1 - 20 / 70:.1%}", "0.75", "0.75"]
    too_little = stopping((700, 30, 8.1), (1000, 30, 8.0), [0.30, 0.31, 0.32])
    assert [verdict.reached for verdict in too_little] == [False, False, False, True]


def test_the_stop_of_a_pair_that_does_not_drift_may_be_five_percent_slower() -> None:
    found = stopping((1000, 95, 8.3), (1000, 95, 8.0), [0.30, 0.31, 0.32])
    assert [verdict.reached for verdict in found] == [True, True, True]
    found = stopping((1000, 95, 8.5), (1000, 95, 8.0), [0.2] * 3)
    assert [verdict.reached for verdict in found] == [False, False, False]


def test_accuracy_of_a_fixed_window_at_equal_tokens_is_linear_between_those_that_ran() -> None:
    by_name = {
        "topd_25": {"tokens_generated": 100, "accuracy": 0.2},
        "full": {"tokens_generated": 300, "accuracy": 0.6},
    }
    assert [truncation_at(tokens, by_name) for tokens in (50, 100, 200, 300, 400)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.6]
    )
    assert truncation_at(1, {}) is None


def test_table_and_page_come_from_the_numbers(tmp_path: Path) -> None:
    found = rows("x", full=([0.5, 0.6, 0.7], 100, 1.0, 216), marginal=([0.5] * 3, 100, 1.0, 216))
    judged = verdicts("x", 216, found)
    text = markdown("x", found, judged, ["a note"])
    assert "| full OPD | 60.0% ± 5.8 | – | 0 k | 0 k | 2.0 (2.0) |" in text
    assert "a note" in text and str(judged[0]) in text
    sweeps = {"pair": "x", "seeds": [1001], "rows": {"k": [{**found[1], "value": k} for k in (2, 4)]}}
    pair = {"rows": found, "verdicts": [{"text": str(verdict)} for verdict in judged]}
    path = tmp_path / "strategies.json"
    path.write_text(json.dumps({"pairs": {"x": pair}, "sweeps": sweeps, "seeds": SEEDS}))
    (tmp_path / "strategies").mkdir()
    page = write_charts(path).read_text()
    assert page.count("data:image/png;base64") == 9
    assert "60.0% ± 5.8" in page and 'src="http' not in page
    assert (tmp_path / "strategies" / "x.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.timeout(400)
def test_quick_run_of_the_command_is_real_and_resumes(tmp_path: Path) -> None:
    command = ["bench", "strategies", "tiny_compatible", "--quick", "--methods", "inflight", "--methods", "random"]
    for again in (False, True):
        done = run_command(*command, "--jobs", "1", folder=tmp_path)
        assert done.code == 0, done.stdout + done.stderr
        result = json.loads((tmp_path / "bench" / "strategies.json").read_text())
        rows = {row["method"]: row for row in result["pairs"]["tiny_compatible"]["rows"]}
        assert list(rows) == ["full", "prune", "inflight", "random"]
        assert ("tiny_compatible/full/1001" in done.stdout) != again
    full, prune, inflight, random = (rows[name] for name in ("full", "prune", "inflight", "random"))
    assert full["runs"][0]["horizon"] == [216, 216]
    assert 0 < prune["tokens_generated"] < full["tokens_generated"]
    assert all(row["phases_cpu_s"][phase] > 0 for row in (full, prune) for phase in ("rollout", "teacher", "train"))
    assert prune["step"]["looks"] == 0 < inflight["step"]["looks"] and inflight["step"]["teacher_tokens"] > 0
    assert inflight["runs"][0]["horizon"][0] == prune["runs"][0]["horizon"][0]
    runs = [tmp_path / "bench" / "strategies" / "tiny_compatible" / name / "1001" for name in ("inflight", "prune")]
    stopped, whole = (read_metrics(run / FILE_NAME)[0][0]["tokens_generated"] for run in runs)
    assert stopped <= whole
    assert random["runs"][0]["horizon"] == prune["runs"][0]["horizon"]
    assert (tmp_path / "bench" / "strategies.html").exists()
