"""The comparison's runs that the repository keeps: which count, and what the table makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.strategies.keep import SIZE, finished_lines, missing
from benchmarks.strategies.kept import KEPT, Line, compared, keep, read_kept, rows, settings_digest, table, valid
from benchmarks.strategies.kept_page import write_kept_page
from benchmarks.strategies.plan import METHODS, RunSpec, Settings, choose, method_config, pair_recipe, plan, run_config
from benchmarks.strategies.rank import Wanted
from tests.benchmarks.strategies_runs import recipe, write_metrics

BY_NAME = {method.name: method for method in METHODS}


def line(
    method: str,
    accuracy: float,
    tokens: int = 100,
    seed: int = 1001,
    processor: str = "a",
    pair: str = "tiny_compatible",
) -> Line:
    cost = {"sync": 9.0, "rollout": tokens / 50, "teacher": 1.0, "train": 1.0}
    settings = settings_digest(method_config(recipe(pair), BY_NAME[method]))
    known = {"pair": pair, "method": method, "seed": seed, "settings": settings, "processor": processor}
    return {**known, "accuracy": accuracy, "tokens_generated": tokens, "cpu_s": cost, "last_window": 200}


def test_a_method_is_known_by_its_settings_and_not_by_its_seed_or_files() -> None:
    prune, full = BY_NAME["prune"], BY_NAME["full"]
    as_run = run_config(recipe(), prune, 1003, Settings(problems=512))
    assert settings_digest(as_run) == settings_digest(method_config(recipe(), prune))
    assert settings_digest(as_run) != settings_digest(method_config(recipe(), full))
    assert as_run.gate is not None
    eager = replace(as_run, rollout=replace(as_run.rollout, enforce_eager=True))
    assert settings_digest(eager) == settings_digest(as_run), "compiled engines make the same tokens"
    assert settings_digest(replace(as_run, gate=replace(as_run.gate, k=3))) != settings_digest(as_run)


def test_finished_runs_are_kept_once_and_quick_ones_not(tmp_path: Path) -> None:
    runs, file = tmp_path / "strategies", tmp_path / "kept.jsonl"
    for seed, problems in ((1001, 512), (1002, 8)):
        folder = runs / "tiny_compatible" / "full" / str(seed)
        folder.mkdir(parents=True)
        config = run_config(recipe(), BY_NAME["full"], seed, Settings(problems=problems))
        Wanted(config, 128).write(folder)
        write_metrics(folder / "metrics.jsonl", config.steps, accuracy=0.25)
    (runs / "tiny_compatible" / "full" / "1003").mkdir()
    found = finished_lines(runs, "a")
    assert [(at["seed"], at["accuracy"], at["last_window"]) for at in found] == [(1001, 0.25, 100 + recipe().steps)]
    assert found[0]["evaluations"] == [[0, 0, 0.1], [recipe().steps, 100 * recipe().steps, 0.25]]
    assert found[0]["windows"][:3] == [101, 106, 111], "every fifth step"
    assert valid(found) == found
    assert (keep(file, found), keep(file, found), keep(file, [{**found[0], "processor": "b"}])) == (1, 0, 1)
    assert read_kept(file)[0] == found[0]


def keys_of(specs: list[RunSpec]) -> set[str]:
    return {spec.key.partition("/")[2] for spec in specs}


def test_only_runs_that_the_processor_lacks_are_made_and_what_a_missing_control_replays() -> None:
    pairs = {"tiny_trap": pair_recipe("tiny_trap", SIZE.overrides)}
    specs = plan(pairs, choose(["popd", "replay"]), [1001, 1002], SIZE)
    assert missing(specs, [], "a") == specs
    methods = ("full", "popd", "prune", "replay")
    eager = [line(name, 0.5, seed=seed, pair="tiny_trap") for name in methods for seed in (1001, 1002)]
    kept = [{**one, "compiled": True} for one in eager]
    assert missing(specs, kept, "b") == missing(specs, eager, "a") == specs
    of_before = [{**one, "settings": "of before"} if one["method"] == "popd" else one for one in kept[:-2]]
    controls = {f"{name}/{seed}" for name in ("prune", "replay") for seed in (1001, 1002)}
    assert keys_of(missing(specs, of_before, "a")) == {"popd/1001", "popd/1002", *controls}
    assert missing(specs, kept, "a") == []


def test_with_models_of_the_package_a_run_on_any_machine_will_do_beside_full_opd_of_the_same_one() -> None:
    pairs = {"tiny_compatible": pair_recipe("tiny_compatible", SIZE.overrides)}
    specs = plan(pairs, choose(["popd", "esr"]), [1001], SIZE)
    kept = [line(name, 0.5) for name in ("full", "popd", "esr")]
    assert missing(specs, kept, "b") == []
    assert keys_of(missing(specs, kept[:2], "b")) == {"full/1001", "esr/1001"}
    here = {**kept[0], "processor": "b", "compiled": True}
    assert keys_of(missing(specs, [*kept[:2], here], "b")) == {"esr/1001"}


def test_a_run_of_other_settings_than_now_is_not_shown() -> None:
    lines = [
        line("full", 0.5),
        {**line("prune", 0.5), "settings": "of before"},
        {**line("full", 0.5), "method": "gone"},
    ]
    assert valid(lines) == lines[:1]


def test_a_run_is_compared_with_full_opd_of_its_seed_and_processor() -> None:
    lines = [
        *(line("full", accuracy, seed=seed) for accuracy, seed in ((0.5, 1001), (0.6, 1002))),
        *(line("popd", accuracy, 60, seed) for accuracy, seed in ((0.52, 1001), (0.64, 1002))),
        line("popd", 0.9, 60, 1001, "b"),
    ]
    found = compared(lines, "tiny_compatible")["popd"]
    assert list(found) == [1001, 1002]
    first = found[1001]
    assert (first.points, first.tokens, first.cpu) == (pytest.approx(2), pytest.approx(0.4), pytest.approx(0.2))
    assert found[1002].points == pytest.approx(4)


def test_a_seed_counts_once_as_its_last_machine_ran_it() -> None:
    lines = [line(name, accuracy) for name, accuracy in (("full", 0.5), ("popd", 0.52))]
    compiled = {"processor": "b", "compiled": True}
    again = [{**line("full", 0.6), **compiled}, {**line("popd", 0.65), **compiled}]
    assert compared([*lines, *again], "tiny_compatible")["popd"][1001].points == pytest.approx(5)
    eager = {**again[1], "compiled": False}  # beside which no full OPD has run
    (row,) = [row for row in rows([*lines, eager], "tiny_compatible") if row.method.name == "popd"]
    assert (row.points, row.error) == (pytest.approx(2), None)


def test_the_table_marks_who_is_not_beaten_in_points_and_tokens() -> None:
    runs = {"full": (0.5, 100), "popd": (0.52, 60), "topd_25": (0.4, 30), "prune": (0.51, 70)}
    lines = [line(name, *numbers, seed=seed) for name, numbers in runs.items() for seed in (1001, 1002)]
    shown = {row.split(" | ")[0]: row for row in table(lines, "tiny_compatible").splitlines()[2:]}
    front = {name.strip("| ") for name, row in shown.items() if "●" in row}
    assert front == {"POPD", "TOPD .25"}
    assert "| 2 | +2.0 ± 0.0 | 40% | 20% | 200 | ● |" in shown["| POPD"]


def test_the_page_has_a_table_and_curves_of_each_pair_also_without_kept_curves(tmp_path: Path) -> None:
    curves = {"evaluations": [[0, 0, 0.1], [50, 90, 0.5]], "windows": [100, 120], "overlaps": [0.5, 0.9]}
    lines = [line("full", 0.5), {**line("popd", 0.6, 70), **curves}, {**line("full", 0.5), "pair": "tiny_drift"}]
    write_kept_page(lines, tmp_path / "kept.html")
    page = (tmp_path / "kept.html").read_text(encoding="utf-8")
    assert page.count('class="compare"') == 2
    assert page.count("<figure>") == 8
    assert "<td>POPD</td><td>1</td><td>+10.0</td><td>30%</td>" in page


def test_all_that_the_repository_keeps_is_of_methods_and_settings_that_there_are() -> None:
    lines = read_kept(KEPT)
    assert valid(lines) == lines
