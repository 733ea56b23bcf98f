"""Runs of a pair without problems to answer, the real pair's: what they leave, and what the judge makes of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.strategies.judged import held_out, judge, judged_evaluations, kept_numbers, read_judged
from benchmarks.strategies.keep import SIZE, finished_lines, missing
from benchmarks.strategies.kept import settings_digest, valid
from benchmarks.strategies.plan import RunSpec, choose, pair_recipe, plan
from benchmarks.strategies.rank import Wanted
from benchmarks.strategies.runs import finished
from prune_opd.config import DataConfig, TrainConfig
from prune_opd.data import ledger
from prune_opd.errors import ConfigError
from tests.benchmarks.strategies_runs import step
from tests.models import write_model

NUMBERS = {"reverse_kl_stderr": 0.01, "student_entropy": 3.0, "teacher_entropy": 2.0, "nll": 3.0}


def real_pair(*methods: str) -> list[RunSpec]:
    return plan({"real_pair": pair_recipe("real_pair", SIZE.overrides)}, choose(methods), [1001], SIZE)


def write_run(folder: Path, config: TrainConfig) -> None:
    folder.mkdir(parents=True)
    Wanted(config, 64).write(folder)
    steps = [json.dumps(step(number, 40)) for number in range(1, config.steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(steps) + "\n", encoding="utf-8")


def write_judged(folder: Path, own: float, given: float) -> None:
    texts = [{"own": {"reverse_kl": at, **NUMBERS}, "given": {"reverse_kl": other, **NUMBERS}}
             for at, other in ((0.5, 0.8), (own, given))]  # fmt: skip
    found = dict(zip(("before", "after"), texts, strict=True))
    (folder / "judged.json").write_text(json.dumps(found), encoding="utf-8")


def test_every_method_of_the_table_has_a_run_of_fewer_steps_that_leaves_a_student_and_asks_no_problems() -> None:
    specs = real_pair("table")
    assert len(specs) == 26
    for spec in specs:
        assert spec.config.steps == 20
        assert spec.config.evaluation.problems == 0 and spec.config.checkpoint.export_hf
    pair_specs = plan({"p": pair_recipe("tiny_compatible")}, choose(["popd"]), [1001], SIZE)
    assert not any(spec.config.checkpoint.export_hf for spec in pair_specs)


def test_a_method_that_is_full_opd_itself_on_the_pair_is_not_run_again() -> None:
    runs = {spec.method.name for spec in missing(real_pair("full_vocab", "popd"), [], "a")}
    assert runs == {"full", "popd"}, "the recipe's objective is that of full_vocab"


def test_where_the_prompt_files_lie_makes_no_other_run() -> None:
    config = real_pair("full")[0].config
    moved = tuple(f"/elsewhere/{Path(source).name}" for source in config.data.mixture)
    assert settings_digest(replace(config, data=replace(config.data, mixture=moved))) == settings_digest(config)
    other = replace(config, data=replace(config.data, mixture=moved[:1], weights=(1.0,)))
    assert settings_digest(other) != settings_digest(config)


def test_a_run_is_finished_when_it_is_judged_and_what_it_has_closed_is_kept(tmp_path: Path) -> None:
    (spec,) = real_pair("full")
    folder = tmp_path / spec.key
    write_run(folder, spec.config)
    assert finished(Wanted.read(folder), folder) is None and finished_lines(tmp_path, "a") == []
    write_judged(folder, own=0.3, given=0.2)
    (line,) = finished_lines(tmp_path, "a")
    assert valid([line]) == [line]
    assert line["accuracy"] == pytest.approx(1 - (0.3 / 0.5 + 0.2 / 0.8) / 2, abs=1e-5)
    assert line["evaluations"] == [[0, 0, 0.0], [20, 2000, line["accuracy"]]]
    assert line["judged"] == kept_numbers(read_judged(folder) or {})
    assert line["judged"]["after"]["own"] == {"reverse_kl": 0.3, **{k: v for k, v in NUMBERS.items() if k != "nll"}}


def test_a_student_that_became_its_teacher_has_closed_all_and_one_that_stayed_has_closed_nothing(
    tmp_path: Path,
) -> None:
    student, teacher = write_model(tmp_path / "student"), write_model(tmp_path / "teacher", seed=3)
    prompts = tmp_path / "sums_held_out.jsonl"
    texts = [ledger.Ledger().problem(5, i).prompt for i in range(24)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    (spec,) = real_pair("full")
    data = DataConfig(source=str(tmp_path / "sums_train.jsonl"))
    config = replace(spec.config, student=str(student), teacher=str(teacher), data=data)
    for outcome, closed in ((teacher, 1.0), (student, 0.0)):
        folder = tmp_path / f"run-{closed:g}"
        folder.mkdir()
        shutil.copytree(outcome, folder / "hf")
        assert judged_evaluations(config, folder) == []
        judge(config, folder)
        first, last = judged_evaluations(config, folder)
        assert (first["step"], first["eval_closed"], last["step"]) == (0, 0.0, config.steps)
        assert last["eval_closed"] == pytest.approx(closed, abs=1e-4)
        assert not (folder / "hf").exists(), "a model a run would fill the disk"


def test_a_pair_without_problems_and_without_held_out_prompts_is_refused(tmp_path: Path) -> None:
    (spec,) = real_pair("full")
    for name in ("sums_train.jsonl", "sums.jsonl"):
        config = replace(spec.config, data=DataConfig(source=str(tmp_path / name)))
        with pytest.raises(ConfigError, match=rf"NAME_held_out\.jsonl .* \S*{name} has none.*set evaluation\.problems"):
            held_out(config)
