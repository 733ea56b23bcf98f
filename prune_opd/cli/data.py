"""`prune-opd data`: look at prompts before a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_opd.config import DataConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.errors import UserError
from prune_opd.model_spec import gguf_problem
from prune_opd.process import table_console
from prune_opd.track.moving import shown

app = typer.Typer(help="Look at prompts, and convert published files of them.", no_args_is_help=True)


@app.command("inspect")
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
    from prune_opd.data.inspect import inspect
    from prune_opd.data.tokenizer import load_tokenizer

    if problem := gguf_problem("--model", str(model)):
        raise UserError(problem)
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"--model {str(model)!r} has no tokenizer: give a Hugging Face model directory")
    config = apply_overrides(DataConfig(source=source), settings or [])
    inspect(config, load_tokenizer(model), shown, max_prompt_len, table_console())
    return 0


@app.command("convert")
def convert_data(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help="dapo-math-17k")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="As published: .parquet, .jsonl or a directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")],
) -> int:
    """Write a published file's rows as prompts, each problem once."""
    from prune_opd.data.inspect import convert

    with shown("converting"):
        prompts = convert(layout, path, out)
    print(f"{prompts} prompts in {out}")
    return 0
