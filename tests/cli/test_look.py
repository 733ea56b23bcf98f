"""`show`, `settings`, `new`, completion, and the package's own names: what one can see without asking anyone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import prune_opd
from prune_opd.check.run import check_structure, check_train
from prune_opd.cli import new as new_recipe
from prune_opd.cli.complete import recipe_names, setting_names
from prune_opd.cli.look import settings_, show
from prune_opd.config import DataConfig, TrainConfig
from prune_opd.config.describe import COMMAND_LINE, DEFAULT, RECIPE, all_settings, matching, values
from prune_opd.config.overrides import apply_overrides, dotted_keys
from prune_opd.config.paths import shipped_models_dir
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.config.yaml import save_config
from prune_opd.errors import ConfigError, UserError

TINY = {name: str(shipped_models_dir() / name) for name in ("student", "teacher")}


# ---------------------------------------------------------------------------------------------------- show, settings


def test_a_value_says_who_gave_it() -> None:
    recipe = load_recipe("tiny_compatible")
    found = {one.key: one for one in values(load_recipe("tiny_compatible", ["gate.k=5"]), recipe)}
    sources = {key: found[key].source for key in ("gate.k", "gate.w_base", "gate.top_p", "steps")}
    assert sources == {"gate.k": COMMAND_LINE, "gate.w_base": RECIPE, "gate.top_p": DEFAULT, "steps": RECIPE}
    assert (found["gate.k"].value, found["gate.k"].default, found["gate.k"].meaning) == (
        "5",
        "16",
        "size of both top-k sets",
    )


@pytest.mark.parametrize("name", list_recipes())
def test_every_setting_of_every_recipe_is_shown_with_its_meaning(name: str) -> None:
    config = load_recipe(name)
    found = values(config, config)
    assert all(one.meaning for one in found)
    if isinstance(config, TrainConfig):
        of_teachers = {one.key for one in found if one.key.startswith("teachers.")}
        assert {one.key for one in found} - of_teachers <= set(dotted_keys(TrainConfig))
        plain = [f"{one.key}={one.value}" for one in found if one.key in of_teachers]
        assert apply_overrides(config, plain) == config  # a teacher's settings can be written as they are shown


def test_defaults_of_numbers_are_told_from_what_a_recipe_wrote() -> None:
    config = load_recipe("qwen3_1_7b_base_from_4b_8xh100")
    found = {one.key: one.source for one in values(config, config)}
    assert found["optimizer.lr"] == found["optimizer.eps"] == DEFAULT and found["data.suffix"] == RECIPE


def test_two_runs_are_held_against_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(
        load_recipe("tiny_compatible", ["seed=7", "gate=null", "horizon.strategy=full"]), tmp_path / "config.yaml"
    )
    assert show("tiny_compatible", None, diff=str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["seed", "0", "7"] for line in lines)
    assert any(line.startswith("gate.k ") and "–" in line for line in lines)
    assert not any(line.startswith("optimizer.lr") for line in lines)


def test_a_run_is_the_same_as_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(load_recipe("tiny_compatible"), tmp_path / "config.yaml")
    assert load_recipe(str(tmp_path / "config.yaml")) == load_recipe(str(tmp_path)) == load_recipe("tiny_compatible")
    show("tiny_compatible", None, diff=str(tmp_path / "config.yaml"))
    assert "have the same settings" in capsys.readouterr().out


def test_a_paper_symbol_a_name_and_a_meaning_find_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert [one.name for one in matching("γ")] == ["gate.threshold"]
    assert all("horizon" in one.name for one in matching("horizon"))
    assert "optimizer.beta1" in [one.name for one in matching("first moment")]
    settings_("watchdog")
    assert "survival.watchdog_minutes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean threshold"):
        matching("treshold")


def test_every_setting_has_one_row() -> None:
    names = [one.name for one in all_settings()]
    assert len(names) == len(set(names)) > 150


def test_tab_offers_recipes_settings_and_choices() -> None:
    assert [name for name, _ in recipe_names("tiny_comp")] == ["tiny_compatible"]
    assert ("gate.k=", "size of both top-k sets") in setting_names("gate.k")
    assert [name for name, _ in setting_names("data.bad_rows=s")] == ["data.bad_rows=skip"]
    assert setting_names("gate.k=") == []


# ---------------------------------------------------------------------------------------------------- new


def write(out: Path, **changes: object) -> TrainConfig:
    wanted = {"nodes": 1, "gpu": "cpu", "data": "ledger", "evaluation": None} | changes
    assert new_recipe.new(TINY["student"], TINY["teacher"], out=out, **wanted) == 0  # type: ignore[arg-type]
    config = load_recipe(str(out))
    assert isinstance(config, TrainConfig)
    return config


def test_a_new_recipe_passes_the_check_of_this_machine(tmp_path: Path) -> None:
    config = write(tmp_path / "mine.py", evaluation="ledger")
    assert check_train(config, 2, tmp_path / "run", "auto") == []
    assert (config.name, config.data, config.evaluation.sources) == ("mine", DataConfig(source="ledger"), ("ledger",))


@pytest.mark.parametrize(
    ("nodes", "pair"), [(1, ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B")), (4, ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B"))]
)
def test_a_new_recipe_of_published_models_fits_and_explains_itself(
    tmp_path: Path, nodes: int, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pair.py"
    assert new_recipe.new(f"models/{pair[0]}", f"models/{pair[1]}", nodes, "h100", None, None, out) == 0
    config = load_recipe(str(out))
    assert isinstance(config, TrainConfig) and config.planning.nodes == nodes
    assert check_structure(config, 8 * nodes) == []
    assert config.parallel.context == 1, "nobody has seen context parallelism run"
    said, text = capsys.readouterr().out, out.read_text(encoding="utf-8")
    assert "it fits" in said and "could not be checked" in said
    assert text.count("        # ") >= 9 and max(map(len, text.splitlines())) <= 120


def test_a_new_recipe_overwrites_nothing(tmp_path: Path) -> None:
    write(tmp_path / "mine.py")
    with pytest.raises(UserError, match="is there already"):
        write(tmp_path / "mine.py")


def test_a_pair_too_large_for_the_nodes_is_told_to_take_more(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="take more nodes"):
        new_recipe.new("m/Qwen/Qwen3-30B-A3B", "m/Qwen/Qwen3-235B-A22B", 1, "h100", None, None, tmp_path / "big.py")
    assert not (tmp_path / "big.py").exists()


# ---------------------------------------------------------------------------------------------------- the package


def test_the_package_is_imported_without_anything_heavy() -> None:
    code = (
        "import sys; from prune_opd import load_recipe, train, __version__;"
        "load_recipe('tiny_compatible', ['steps=2']);"
        "print(sorted({'torch', 'megatron', 'vllm', 'transformers', 'matplotlib'} & sys.modules.keys()), __version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"[] {prune_opd.__version__}\n"


def test_training_from_python_is_refused_like_the_commands(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not divide"):
        prune_opd.train(load_recipe("tiny_compatible"), tmp_path / "run", nproc=3)
    with pytest.raises(ConfigError, match="prune-opd sft"):
        prune_opd.train(load_recipe("tiny_base"))
    assert not (tmp_path / "run").exists()


def test_a_name_that_the_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        prune_opd.trian  # noqa: B018
