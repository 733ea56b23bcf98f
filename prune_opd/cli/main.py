"""The `prune-opd` command. It loads, checks and starts ranks (`cli/worker.py`); nothing heavy is imported on this side.

Bad input ends with one `error:` line per problem: exit code 2 for a recipe or an override, 1 for what `check/run.py`
refuses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from prune_opd.check.run import check_eval, check_everything, check_sft, check_structure, check_train
from prune_opd.cli import worker
from prune_opd.config import DataConfig, RunConfig, SftConfig, TrainConfig
from prune_opd.config.changes import changes
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import load_config, save_config
from prune_opd.data.render import Format
from prune_opd.errors import ConfigError, UserError
from prune_opd.eval.evaluate import Sampling, write_rows
from prune_opd.eval.run import SEED, EvalJob, results_table
from prune_opd.ranks.launcher import start_ranks
from prune_opd.track.metrics import Record

C = TypeVar("C", bound=RunConfig)
WORKER = ("-m", "prune_opd.cli.worker")


def _exit(code: int) -> None:
    """A command returns its exit code."""
    raise typer.Exit(code)


app = typer.Typer(
    help="Prune-OPD: on-policy distillation that prunes unreliable rollouts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    result_callback=_exit,
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A name (see `prune-opd recipes`) or a path to a file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as horizon.strategy=full.")
]
Nproc = Annotated[int | None, typer.Option(min=1, help="Ranks on this node.", show_default="parallel.nproc")]
RunDir = Annotated[Path | None, typer.Option(help="The run directory.", show_default="runs/NAME")]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="Where to go on from.")] = "auto",
    run_dir: RunDir = None,
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Go on with settings that make another run of it.")
    ] = False,
) -> int:
    """Train a recipe: distil its teacher into its student. Goes on where an earlier run in RUN_DIR stopped."""
    config = _load(recipe, overrides, TrainConfig, "train")
    ranks = _ranks(nproc, config)
    run_dir = (run_dir or _default_run_dir(config)).absolute()
    # Rank 0 fills the run directory while the others may still be checking: only rank 0 looks at it.
    looked_at = run_dir if worker.is_main_rank() else None
    _refuse(check_train(config, ranks, looked_at, resume, allow_config_change))
    for line in changes(config, looked_at, resume) if looked_at else []:
        print(f"changed since the run began: {line}", flush=True)
    if resume == "auto" and _is_finished(config, run_dir):
        print(f"{run_dir} is finished; to draw its report again: prune-opd report {run_dir}")
        return 0
    if _is_rank():
        return worker.train(config, run_dir, resume, allow_config_change)
    print(f"{config.name}: {ranks} ranks, run directory {run_dir}", flush=True)
    allowed = ["--allow-config-change"] if allow_config_change else []
    return _start("train", config, ranks, "--run-dir", str(run_dir), "--resume", resume, *allowed)


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    run_dir: RunDir = None,
    structure: Annotated[
        bool, typer.Option("--structure", help="Only what needs neither weights nor GPUs: layout, lengths, sizes.")
    ] = False,
) -> int:
    """Every check of a recipe that needs no GPU: prints a line per problem and exits with 1, or prints ok."""
    config = apply_overrides(load_recipe(recipe), overrides or [])
    ranks = _ranks(nproc, config)
    if not isinstance(config, TrainConfig):
        problems = check_sft(config, ranks)
    else:
        if not _is_rank() and nproc is None:
            ranks *= config.planning.nodes
        problems = (
            check_structure(config, ranks)
            if structure
            else check_everything(config, ranks, run_dir or _default_run_dir(config))
        )
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


@app.command()
def sft(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing if the output was made with these settings.")
    ] = False,
) -> int:
    """Supervised training of a tiny model. With overrides, give output=DIR too: the cache holds what recipes say."""
    recipe_config = _load(recipe, None, SftConfig, "sft")
    config = apply_overrides(recipe_config, overrides or [])
    if config != recipe_config and config.output == recipe_config.output:
        raise ConfigError(f"output = {config.output!r} belongs to the recipe without overrides: add output=DIR")
    if if_missing and _is_made(config):
        print(f"{config.output} is there already")
        return 0
    ranks = _ranks(nproc, config)
    _refuse(check_sft(config, ranks))
    return worker.sft(config) if _is_rank() else _start("sft", config, ranks)


@app.command("eval")
def evaluate(
    model_dirs: Annotated[
        list[Path], typer.Argument(metavar="MODEL_DIR", help="Hugging Face model directories, or a run's checkpoints.")
    ],
    task: Annotated[
        list[str], typer.Option(metavar="FILE|NAME", help="As data.source, with answers; give it again for more.")
    ],
    samples: Annotated[int, typer.Option("-k", min=1, help="Samples per problem.")] = 16,
    problems: Annotated[int, typer.Option(min=1, help="Problems of a task.")] = 256,
    max_len: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of a response.", show_default="what the model has positions for"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    suffix: Annotated[str, typer.Option(help="After every problem; these four are as in data.*.")] = "",
    system_prompt: Annotated[str | None, typer.Option(help="Before every problem.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="The chat template's switch.")
    ] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Through the chat template, or not.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where eval.jsonl and every sampled answer go.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this node.")] = 1,
) -> int:
    """Accuracy of models on tasks: avg@k with its 95 % interval, pass@k; several models or tasks make a table."""
    sampling = Sampling(samples, max_len or 0, temperature, top_p, SEED)
    format = Format(chat, system_prompt, suffix, thinking)
    for source in task:
        DataConfig(source=source, **asdict(format))  # refuses what does not go together
    _refuse([problem for model_dir in model_dirs for problem in check_eval(model_dir, task, top_p, out)])
    if _is_rank():
        return worker.evaluate(EvalJob(str(model_dirs[0]), tuple(task), problems, sampling, format))
    results: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        found = Path(folder) / "results.jsonl"
        for number, model_dir in enumerate(model_dirs):
            answers = out / f"generations-{number}.jsonl" if out else None
            job = EvalJob(
                str(_as_model(model_dir, Path(folder) / f"model-{number}")),
                tuple(task),
                problems,
                sampling,
                format,
                None if answers is None else str(answers),
                str(found),
            )
            if code := start_ranks([*WORKER, "eval", job.to_json()], nproc, os.environ):
                return code
            results += [{**json.loads(line), "model": str(model_dir)} for line in found.read_text().splitlines()]
    if out:
        write_rows(out / "eval.jsonl", results)
    if len(results) > 1:
        Console().print(results_table(results))
    return 0


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Of a run: RUN_DIR/checkpoints/….")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the Hugging Face directory goes.")],
) -> int:
    """Write a checkpoint as a Hugging Face directory, which transformers and vLLM load."""
    if not checkpoint.is_dir():
        raise UserError(f"CHECKPOINT = {str(checkpoint)!r}: there is no such directory; give RUN_DIR/checkpoints/…")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"OUT_DIR = {str(out_dir)!r} is there already: choose a new directory")
    if _is_rank():
        return worker.export(checkpoint, out_dir)
    return start_ranks([*WORKER, "export", str(checkpoint), str(out_dir)], 1, os.environ)


@app.command()
def convert(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face directory, weights pickled.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the directory with safetensors goes.")],
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read the pickle (its tensors only).")] = False,
) -> int:
    """Turn pickled weights, which nothing else here reads, into safetensors."""
    from prune_opd.weights.convert import convert_pickle

    convert_pickle(model_dir, out_dir, allow_pickle)
    return 0


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Several runs give a comparison.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file.", show_default="RUN_DIR/report.html, or comparison.html beside the first"),
    ] = None,
) -> int:
    """Draw the report of a run, or compare several: one HTML file and a PNG beside it."""
    from prune_opd.track.report import write_report

    if out is None:
        first = run_dirs[0].absolute()
        out = first / "report.html" if len(run_dirs) == 1 else first.parent / "comparison.html"
    write_report(run_dirs, out)
    print(out)
    return 0


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="NAME [ARG …] [--out DIR] [--quick]",
)
def bench(context: typer.Context) -> int:
    """Run a benchmark: prints a table and writes every measurement to DIR/NAME.json (`prune-opd bench --help`)."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks").is_dir():
        raise UserError("the benchmarks are not part of an installed copy: run `prune-opd bench` from a checkout")
    sys.path.insert(0, str(checkout))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    from benchmarks.cli import run_benchmark

    return run_benchmark(context.args)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100 or h200", show_default="planning.gpu")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes.", show_default="planning.nodes")] = None,
    search: Annotated[bool, typer.Option("--search", help="Name the fastest layouts that fit.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where plan.json and plan.png go.")] = None,
) -> int:
    """Memory by phase, step time and cost of a recipe on GPUs that nobody has taken yet; exit 1 if it does not fit."""
    from prune_opd.plan.command import run_plan

    return run_plan(_load(recipe, overrides, TrainConfig, "plan"), gpu, nodes, search, out)


data = typer.Typer(help="Look at prompts, and convert published files of them.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("inspect")
def inspect_data(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file, a dataset directory, or a task's name.")],
    model: Annotated[Path, typer.Option(metavar="MODEL_DIR", help="Whose tokenizer and chat template.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of data.*, such as suffix='…' or thinking=false.")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Prompts to show.")] = 3,
    max_prompt_len: Annotated[int | None, typer.Option(min=1, help="Longer prompts are bad rows.")] = None,
) -> int:
    """Show prompts as the model gets them, their lengths, and the rows that are none."""
    from transformers import AutoTokenizer

    from prune_opd.data.inspect import inspect

    if not (model / "tokenizer_config.json").is_file():
        raise UserError(f"--model {str(model)!r} has no tokenizer: give a Hugging Face model directory")
    config = apply_overrides(DataConfig(source=source), settings or [])
    inspect(config, AutoTokenizer.from_pretrained(model), shown, max_prompt_len, Console())
    return 0


@data.command("convert")
def convert_data(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help="dapo-math-17k")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="As published: .parquet, .jsonl or a directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")],
) -> int:
    """Write a published file's rows as prompts, each problem once."""
    from prune_opd.data.inspect import convert

    print(f"{convert(layout, path, out)} prompts in {out}")
    return 0


@app.command()
def recipes() -> int:
    """List the recipes of the repository with their models, GPUs and planned hours."""
    from prune_opd.plan.command import print_recipes

    print_recipes()
    return 0


# ---------------------------------------------------------------------------------------------------- helpers


def _load(recipe: str, overrides: list[str] | None, kind: type[C], command: str) -> C:
    config = load_recipe(recipe)
    if not isinstance(config, kind):
        other = "train" if command == "sft" else "sft"
        raise ConfigError(f"recipe {recipe!r} is not for `prune-opd {command}`: run `prune-opd {other} {recipe}`")
    return apply_overrides(config, overrides or [])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _as_model(path: Path, folder: Path) -> Path:
    """A Hugging Face directory as it is; of a checkpoint, its student in `folder`."""
    if not (path / "state.json").is_file():
        return path
    if code := start_ranks([*WORKER, "export", str(path), str(folder)], 1, os.environ):
        raise UserError(f"MODEL_DIR = {str(path)!r}: the checkpoint could not be exported (exit code {code})")
    return folder


def _is_rank() -> bool:
    """Whether torchrun or srun started this process as one of its ranks."""
    return "RANK" in os.environ


def _ranks(nproc: int | None, config: RunConfig) -> int:
    if _is_rank():
        return int(os.environ.get("WORLD_SIZE", "1"))
    return nproc or config.parallel.nproc


def _default_run_dir(config: TrainConfig) -> Path:
    return Path("runs") / config.name


def _is_finished(config: TrainConfig, run_dir: Path) -> bool:
    """Whether the last step's checkpoint and, if wanted, the export of the student are there."""
    checkpoints = run_dir / "checkpoints"
    try:
        latest = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
        step = json.loads((latest / "state.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return False
    exported = (run_dir / "hf" / "config.json").is_file() or not config.checkpoint.export_hf
    return bool(step >= config.steps and exported)


def _is_made(config: SftConfig) -> bool:
    output = Path(config.output)
    try:
        return (output / "model.safetensors").is_file() and load_config(output / "sft_config.yaml") == config
    except ConfigError:  # made by another version: make it again
        return False


def _start(command: str, config: RunConfig, nproc: int, *options: str) -> int:
    """Run a worker command on `nproc` ranks. They read the resolved config from a file that goes away with them."""
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        resolved = Path(folder) / "config.yaml"
        save_config(config, resolved)
        return start_ranks([*WORKER, command, str(resolved), *options], nproc, os.environ)


def main() -> None:
    worker.protect_files()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are directories: a missing file is an error, not a download
    try:
        app()
    except UserError as error:
        worker.report(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
