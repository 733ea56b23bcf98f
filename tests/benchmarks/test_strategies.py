"""The comparison of strategies: its methods, order and resuming; and one quick real run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.strategies.plan import (
    IN_TABLE,
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
from benchmarks.strategies.rank import Wanted
from benchmarks.strategies.runs import finished, records_of, run_all
from prune_opd.config.paths import recipes_dir
from prune_opd.config.yaml import config_differences
from prune_opd.errors import ConfigError, UserError
from prune_opd.track.metrics import FILE_NAME, read_metrics
from tests.benchmarks.strategies_runs import SEEDS, recipe, write_metrics
from tests.forked.command import run_command

PAIRS = [name for name in ("tiny_compatible", "tiny_drift", "tiny_trap") if (recipes_dir() / f"{name}.py").exists()]
QUIET = Console(quiet=True)


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


def test_a_recipe_with_several_teachers_or_rows_on_disk_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tiny_two_teachers' has teachers = ledger, sorting"):
        pair_recipe("tiny_two_teachers")
    with pytest.raises(ConfigError, match=r"teacher_cache\.mode = use with the pair 'tiny_compatible'"):
        pair_recipe("tiny_compatible", ["teacher_cache.mode=use", "teacher_cache.dir=rows"])


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
    rivals = [method.name for method in choose(["rivals"])]
    assert {"full", "prune", "kat", "semi_opd", "adwin", "fastopd", "vopd"} < set(rivals) and "popd" not in rivals
    assert "kat" not in {method.name for method in choose(None)}
    table = {method.name for method in choose(["table"])}
    assert table == IN_TABLE > set(rivals) - {"prune"}, "what its methods are compared with is in it too"
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


def small_plan(*names: str) -> list[RunSpec]:
    return plan({"tiny_compatible": pair_recipe("tiny_compatible", ["steps=2"])}, choose(names), SEEDS[:2], Settings())


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


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.timeout(400)
def test_quick_run_of_the_command_is_real_and_resumes(tmp_path: Path) -> None:
    command = ["bench", "strategies", "tiny_compatible", "--quick", "--methods", "inflight", "--methods", "random"]
    command += ["--first-seed", "1003"]
    for again in (False, True):
        done = run_command(*command, "--jobs", "1", folder=tmp_path)
        assert done.code == 0, done.stdout + done.stderr
        result = json.loads((tmp_path / "bench" / "strategies.json").read_text())
        rows = {row["method"]: row for row in result["pairs"]["tiny_compatible"]["rows"]}
        assert list(rows) == ["full", "prune", "inflight", "random"]
        assert ("tiny_compatible/full/1003" in done.stdout) != again
    full, prune, inflight, random = (rows[name] for name in ("full", "prune", "inflight", "random"))
    assert full["runs"][0]["horizon"] == [216, 216]
    assert 0 < prune["tokens_generated"] < full["tokens_generated"]
    assert all(row["phases_cpu_s"][phase] > 0 for row in (full, prune) for phase in ("rollout", "teacher", "train"))
    assert prune["step"]["looks"] == 0 < inflight["step"]["looks"] and inflight["step"]["teacher_tokens"] > 0
    assert inflight["runs"][0]["horizon"][0] == prune["runs"][0]["horizon"][0]
    runs = [tmp_path / "bench" / "strategies" / "tiny_compatible" / name / "1003" for name in ("inflight", "prune")]
    stopped, whole = (read_metrics(run / FILE_NAME)[0][0]["tokens_generated"] for run in runs)
    assert stopped <= whole
    assert random["runs"][0]["horizon"] == prune["runs"][0]["horizon"]
    assert random["tokens_generated"] != prune["tokens_generated"], "random limits reach the engine"
    assert (tmp_path / "bench" / "strategies.html").exists()
