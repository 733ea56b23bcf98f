"""`prune-opd plan`, `check --structure` and `recipes` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prune_opd.cli.main import app
from prune_opd.config import SftConfig, TrainConfig
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.config.yaml import save_config
from tests.fake_models import train_config, write_model

SMALL = "r1_1_5b_from_justrl_8xh100"


def run(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output


def test_a_plan_prints_tables_and_writes_a_chart(tmp_path: Path) -> None:
    code, text = run("plan", SMALL, "--gpu", "h100", "--nodes", "1", "--out", tmp_path)
    assert code == 0, text
    for word in ("start", "rollout s", "run GPU-h", "KV cache", "batch grows with the GPUs", "fits"):
        assert word in text
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["fits"] and record["gpus"] == 8
    assert record["steps"]["planned"]["gpu_hours"] < record["steps"]["full"]["gpu_hours"]
    assert set(record["curves"]["growing batch"]) >= {"8", "64", "1024"}
    assert (tmp_path / "plan.png").stat().st_size > 20_000


def test_what_does_not_fit_exits_with_1_and_says_why() -> None:
    code, text = run("plan", "r1_7b_from_skywork_8xh100", "rollout.gpu_memory_utilization=0.9")
    assert code == 1
    assert "does not fit: phase rollout takes" in text


def test_the_search_names_layouts() -> None:
    code, text = run("plan", SMALL, "--search")
    assert code == 0
    assert "Fastest layouts that fit" in text and "parallel.tensor=" in text


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_passes_the_structural_check(name: str, tmp_path: Path) -> None:
    config, overrides = load_recipe(name), []
    if isinstance(config, TrainConfig) and config.planning.gpu == "cpu":  # models that are made, not published
        roles = ["student", *([f"teachers.{name}.path" for name in config.teachers] or ["teacher"])]
        overrides = [f"{role}={write_model(tmp_path / role)}" for role in roles]
    if isinstance(config, SftConfig) and config.init is not None:  # a model that another recipe makes
        overrides = [f"init={write_model(tmp_path / 'init')}"]
    assert run("check", name, "--structure", *overrides) == (0, "ok\n")


def test_a_structural_check_names_what_is_wrong_without_the_weights() -> None:
    code, text = run("check", SMALL, "parallel.tensor=8", "horizon.max_len=200000", "--structure")
    assert code == 1
    assert "key-value heads of the student" in text and "positions of the student" in text


def test_recipes_are_listed_with_models_gpus_and_hours() -> None:
    code, text = run("recipes")
    assert code == 0
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert set(lines) == set(list_recipes())
    assert "8 × h100" in lines[SMALL] and " h " in lines[SMALL] and "R1-Distill-Qwen-1.5B" in lines[SMALL]
    assert "does not fit" not in text


def test_a_recipe_outside_the_repository_is_checked_and_planned_by_its_path(tmp_path: Path) -> None:
    config = train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))
    save_config(config, tmp_path / "mine.yaml")
    source = "from pathlib import Path\nfrom prune_opd.config.yaml import load_config\n"
    source += f"def mine():\n    return load_config(Path({str(tmp_path / 'mine.yaml')!r}))\n"
    (tmp_path / "mine.py").write_text(source)
    path = tmp_path / "mine.py"
    assert run("check", path, "--structure") == (0, "ok\n")
    code, text = run("plan", path, "--gpu", "h100")
    assert code == 0, text
    (hours,) = [line for line in text.splitlines() if "run GPU-h" in line]
    assert all(0 < float(cell) < 1 for cell in hours.split("│")[2:-1])  # three steps of a tiny model, and no "0"
