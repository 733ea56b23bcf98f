"""A CPU run compiles vLLM's model where that pays: the rule, and what the train command makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prune_opd.cli import runs
from prune_opd.config import TrainConfig, to_dict
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import UserError
from prune_opd.plan.compiling import LAYER_SAVES, LAYER_TRACING, compiling

ENOUGH = LAYER_TRACING / LAYER_SAVES  # engine steps


def recipe(*overrides: str) -> TrainConfig:
    config = apply_overrides(load_recipe("tiny_compatible"), ["horizon.strategy=full", *overrides])
    assert isinstance(config, TrainConfig)
    return config


def test_engine_steps_are_those_of_all_rollouts_and_evaluations() -> None:
    config = recipe("steps=40", "horizon.max_len=200", "evaluation.every=10", "evaluation.max_len=100")
    assert compiling(config, layers=4, world=2).engine_steps == 40 * 200 + (1 + 4) * 100
    none = recipe("steps=40", "horizon.max_len=200", "evaluation.problems=0")
    assert compiling(none, layers=4, world=2).engine_steps == 40 * 200
    waves = recipe("steps=40", "horizon.max_len=200", "evaluation.problems=0", "rollout.max_num_seqs=8")
    assert compiling(waves, layers=4, world=2).engine_steps == 2 * 40 * 200  # 16 rows an engine
    assert compiling(waves, layers=4, world=1).engine_steps == 4 * 40 * 200
    fours = recipe("steps=42", "horizon.max_len=200", "evaluation.problems=0", "rollout.refresh_every=4")
    assert compiling(fours, layers=4, world=2).engine_steps == 11 * 200  # 4 steps' rows run at a time
    once = recipe("steps=40", "horizon.max_len=200", "evaluation.problems=0", "rollout.refresh_every=0")
    assert compiling(once, layers=4, world=2).engine_steps == 3 * 200  # 40 · 32 rows, 512 at a time


def test_it_pays_from_so_many_engine_steps_on_whatever_the_layers() -> None:
    for layers in (4, 36):
        fewer, more = (
            compiling(
                recipe(f"steps={int(ENOUGH / 100) + n}", "horizon.max_len=100", "evaluation.problems=0"), layers, 2
            )
            for n in (-1, 1)
        )
        assert not fewer.pays and more.pays
    assert "does not compile" in str(fewer) and "vLLM compiles" in str(more)


def test_the_quickstart_does_not_compile_and_a_long_run_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "compiler_problems", lambda rollout, gpu: [])
    short, long = recipe("horizon.strategy=prune"), recipe("steps=400")
    assert runs.compiled_if_it_pays(short, 2, True) == short
    decided = runs.compiled_if_it_pays(long, 2, True)
    assert decided == replace(long, rollout=replace(long.rollout, enforce_eager=False))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("vLLM does not compile the model: ") and second.startswith("vLLM compiles the model: ")
    assert runs.compiled_if_it_pays(decided, 2, True) == decided  # and so when the run's config.yaml is given again


def test_what_is_set_stays_and_where_there_is_no_compiler_the_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "compiler_problems", lambda rollout, gpu: ["no g++"])
    eager, left_open = recipe("steps=400", "rollout.enforce_eager=true"), recipe("steps=400")
    assert runs.compiled_if_it_pays(eager, 2, True) == eager
    assert runs.compiled_if_it_pays(left_open, 2, True) == left_open
    assert capsys.readouterr().out.rstrip().endswith("; but no g++")
    monkeypatch.setattr(runs, "has_gpu", lambda: True)  # the engine compiles there
    assert runs.compiled_if_it_pays(left_open, 2, True) == left_open
    assert capsys.readouterr().out == ""


def checkpoint(run_dir: Path, config: TrainConfig) -> Path:
    """What a start that decided on `config` leaves of itself."""
    folder = run_dir / "checkpoints" / "step_000010"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 10, "config": to_dict(config)}))
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    return folder


@pytest.mark.parametrize("path", [False, True], ids=["auto", "path"])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_a_resumed_run_keeps_the_decision_of_its_checkpoint(
    tmp_path: Path, compiles: bool, path: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length of the run, from which a new one would follow, has become another."""
    monkeypatch.setattr(runs, "compiler_problems", lambda rollout, gpu: [])
    steps = {True: "steps=400", False: "steps=40"}
    begun, now = (runs.compiled_if_it_pays(recipe(steps[it]), 2, False) for it in (compiles, not compiles))
    assert (begun.rollout.enforce_eager is False) == compiles != (now.rollout.enforce_eager is False)
    folder = checkpoint(tmp_path, begun)
    resumed = runs._resumed(tmp_path, str(folder) if path else "auto")
    for ranks in (1, 2):
        kept = runs.compiled_if_it_pays(recipe(steps[not compiles]), ranks, ranks == 2, resumed)
        assert kept.rollout == begun.rollout
    verb = "compiles" if compiles else "does not compile"
    assert capsys.readouterr().out.startswith(f"vLLM {verb} the model, as before step_000010 (")
    other = recipe(f"rollout.enforce_eager={str(compiles).lower()}")
    assert runs.compiled_if_it_pays(other, 2, True, resumed) == other  # what is set goes before
    assert runs.compiled_if_it_pays(recipe(steps[not compiles]), 2, False, runs._resumed(tmp_path, "never")) == now


def test_a_run_that_was_compiled_does_not_go_on_in_silence_where_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, recipe("rollout.enforce_eager=false"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"step_000010 is of\. .*\(no-such-compiler\).*rollout.enforce_eager=true$"):
        runs.compiled_if_it_pays(recipe(), 2, True, runs._resumed(tmp_path, "auto"))


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3}', '{"step": 3, "config": null}'])
def test_a_checkpoint_that_cannot_be_read_decides_nothing(tmp_path: Path, text: str) -> None:
    (checkpoint(tmp_path, recipe()) / "state.json").write_text(text)
    assert runs._resumed(tmp_path, "auto") is None
