"""Commands in README and docs exist: subcommands, options, recipes, settings with their values, make targets."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from benchmarks.cli import BENCHMARKS
from prune_opd.cli.main import app
from prune_opd.config import DataConfig, SftConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides, dotted_keys
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.errors import ConfigError
from tests.docs.pages import PAGES, ROOT, SPAN, commands, prose, python_blocks

COMMAND: Any = typer.main.get_command(app)
SETTINGS = {*dotted_keys(TrainConfig), *dotted_keys(SftConfig)}
SECTIONS = {key.partition(".")[0] for key in SETTINGS if "." in key}
OWN = {"./my_run.py": "my_run"}  # recipes that a page shows
KEY, FILES = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*"), (".py", ".md", ".json", ".jsonl", ".yaml")
GOES_WITH = {
    "gate=null": ["horizon.strategy=full"],
    "rollout.inflight.mode=gate": ["rollout.inflight.first_check=54"],
}
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_name
def test_prune_opd_commands_exist_with_their_options_recipes_and_settings(page: Path) -> None:
    for line in commands(page, "prune-opd"):
        try:
            check_command(line)
        except (AssertionError, ConfigError) as error:
            raise AssertionError(f"{page.name}: `{line}`: {error}") from error


def check_command(line: str) -> None:
    words = shlex.split(re.sub(r"[\[\]](?!\S*[\"'])", " ", line) if " [" in line else line)[1:]
    command = COMMAND
    while hasattr(command, "commands") and words and not words[0].isupper():
        if words[0].startswith("-"):
            assert words[0] in {name for one in command.params for name in one.opts}, f"there is no option {words[0]}"
            return
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    if command.name == "bench":
        assert not words or words[0] in {*BENCHMARKS, "NAME", "--help"}, f"there is no benchmark {words[0]}"
        return
    options = {name: one for one in command.params for name in one.opts + one.secondary_opts if name.startswith("-")}
    arguments, rest = [], iter(words)
    for word in rest:
        if word in ("--help", "-h"):
            continue
        if not word.startswith("-"):
            arguments.append(word)
            continue
        assert word in options, f"{command.name} has no option {word}"
        if not options[word].is_flag:
            next(rest)
    takes = [one.name for one in command.params if isinstance(one, click.Argument) or one.param_type_name == "argument"]
    if "overrides" in takes:
        check_settings(arguments)
    elif command.name == "inspect":
        apply_overrides(
            DataConfig(source="prompts.jsonl"), [word for word in arguments if "=" in word and not is_placeholder(word)]
        )


def is_placeholder(override: str) -> bool:
    key, _, value = override.partition("=")
    return key.lower() == "key" or "…" in value or value.isupper()


def check_settings(arguments: list[str]) -> None:
    """A recipe and what is set in it: known, and values that are taken."""
    recipes = [word for word in arguments if "=" not in word and word not in ("RECIPE", "…")]
    overrides = [word for word in arguments if "=" in word and not is_placeholder(word)]
    assert len(recipes) <= 1, f"several recipes: {recipes}"
    for recipe in recipes:
        written = recipe.startswith("runs/") and recipe.endswith("/config.yaml")  # what a run has left
        assert recipe in list_recipes() or recipe in OWN or written, f"there is no recipe {recipe}"
    known = [recipe for recipe in recipes if recipe in list_recipes()]
    apply_overrides(load_recipe(known[0] if known else "tiny_compatible"), overrides)


def test_a_command_that_does_not_exist_is_found() -> None:
    for line in (
        "prune-opd trian tiny_compatible",
        "prune-opd train tiny_compatible --run_dir x",
        "prune-opd train tiny_compatibel",
        "prune-opd data inspect a.jsonl --model M sufix=x",
        "prune-opd bench losss",
    ):
        with pytest.raises((AssertionError, ConfigError)):
            check_command(line)
    with pytest.raises(ConfigError, match=r"horizon\.rho"):
        check_command("prune-opd train tiny_compatible horizon.strategy=topd horizon.rho=2")


def test_commands_are_found_at_all() -> None:
    assert sum(len(commands(page, "prune-opd")) for page in PAGES) > 60
    assert sum(len(commands(page, "make")) for page in PAGES) > 20


@by_name
def test_settings_in_code_spans_exist_and_take_their_values(page: Path) -> None:
    """`horizon.rho`, `gate=null`, `horizon.strategy=full gate=null`."""
    for span in SPAN.findall(prose(page)):
        words = [word for word in span.split() if KEY.fullmatch(word.partition("=")[0])]
        named = [word for word in words if word.partition(".")[0] in SECTIONS and not word.endswith(FILES)]
        missing = [word for word in named if word.partition("=")[0] not in SETTINGS]
        assert not [word for word in missing if not word.startswith("stages.0.")], f"{page.name}: `{span}`"
        if words == span.split() and all("=" in word and word.partition("=")[0] in SETTINGS for word in words):
            beside = [setting for word in words for setting in GOES_WITH.get(word, [])]
            apply_overrides(
                load_recipe("tiny_compatible"), [*beside, *(word for word in words if not is_placeholder(word))]
            )


@by_name
def test_make_targets_and_their_variables_exist(page: Path) -> None:
    makefiles = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "launch/targets.mk"))
    targets = set(re.findall(r"^([a-z0-9-]+):", makefiles, re.M))
    variables = set(re.findall(r"\b([A-Z]+) \?=|\$\(([A-Z_]+)\)|\b([A-Z]+)=", makefiles))
    known = {name for names in variables for name in names if name}
    for line in commands(page, "make"):
        for word in shlex.split(line)[1:]:
            name, equals, value = word.partition("=")
            if equals:
                assert name in known, f"{page.name}: `{line}`: no makefile asks for {name}"
                assert name != "RECIPE" or value in {"…", *list_recipes()}, f"{page.name}: `{line}`: no such recipe"
                assert name != "CLUSTER" or value == "…" or (ROOT / "launch" / "clusters" / f"{value}.yaml").exists()
                continue
            for target in word.split("|"):
                assert target in targets, f"{page.name}: `{line}`: there is no target {target}"


def test_make_knows_how_to_reach_every_target() -> None:
    named = {word for page in PAGES for line in commands(page, "make") for word in shlex.split(line)[1:]}
    targets = sorted({target for word in named if "=" not in word for target in word.split("|")})
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_own_recipe_of_the_recipes_page_is_checked_by_its_path(tmp_path: Path) -> None:
    (code,) = python_blocks(ROOT / "docs" / "recipes.md")
    path = tmp_path / "my_run.py"
    path.write_text(code, encoding="utf-8")
    config = load_recipe(str(path))
    assert isinstance(config, TrainConfig) and (config.name, config.steps) == ("my_run", 20)
    assert len(code.strip().splitlines()) <= 10, "ten lines, it says"
