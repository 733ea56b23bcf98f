"""`prune-opd eval`, `export` and `convert`: commands about models that are there."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from prune_opd.check.run import check_eval, eval_layout_problems
from prune_opd.cli.runs import refuse
from prune_opd.cli.start import is_rank, on_ranks
from prune_opd.errors import UserError
from prune_opd.eval.evaluate import Sampling, write_rows
from prune_opd.eval.inherit import EXTRACT, of_run
from prune_opd.eval.run import SEED, EvalJob, results_table
from prune_opd.process import table_console
from prune_opd.track.console import unreadable_notes
from prune_opd.track.metrics import Record, readable
from prune_opd.track.moving import shown

AS_RUN = "the run's"
UNALIKE = "and are asked or read differently: give --suffix, --system-prompt, --thinking, --chat or --extract for all"


def evaluate(
    model_dirs: Annotated[
        list[Path], typer.Argument(metavar="MODEL_DIR", help="Hugging Face directories, runs, or checkpoints of runs.")
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
    suffix: Annotated[
        str | None, typer.Option(help="After every problem; these four are as in data.*.", show_default=AS_RUN)
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Before every problem.", show_default=AS_RUN)] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="The chat template's switch.", show_default=AS_RUN),
    ] = None,
    extract: Annotated[
        str | None,
        typer.Option(
            metavar="READER",
            help="How answers are read (not the ledger's): box, as the papers do; last_number; box_or_last_number;"
            " choice; regex:PATTERN. As evaluation.extract.",
            show_default=f"the run's, else {EXTRACT}",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Through the chat template, or not.", show_default=AS_RUN),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where eval.jsonl and every sampled answer go.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this node.")] = 1,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks that share one copy of a model that is too large for one GPU.")
    ] = 1,
) -> int:
    """Accuracy of models on tasks: avg@k with its 95 % interval, pass@k; several models or tasks make a table.

    A model of a run is asked and read as in that run (chat, system prompt, suffix, thinking, extract), but for what is
    given here.
    """
    sampling = Sampling(samples, max_len or 0, temperature, top_p, SEED)
    given: dict[str, Any] = {"chat": chat, "system_prompt": system_prompt, "suffix": suffix, "thinking": thinking}
    found_models = [of_run(model_dir) for model_dir in model_dirs]
    wrong = [
        problem
        for model in found_models
        for problem in check_eval(model.model_dir, task, top_p, out, model.extract(extract))
    ]
    wrong += [
        problem for model in found_models for problem in eval_layout_problems(model.model_dir, nproc, tensor_parallel)
    ]
    refuse(list(dict.fromkeys(wrong)))  # what is wrong with a task is so for every model
    forms = [(tuple(model.task(source, given) for source in task), model.extract(extract)) for model in found_models]
    for model in found_models:
        if not is_rank() and (taken := model.inherited(task, given, extract)):
            typer.echo(f"note: {model.model_dir} is asked and read as in its run: {taken}", err=True)
    if len(set(forms)) > 1:
        typer.echo(f"note: these models are of runs with different settings, {UNALIKE}", err=True)
    if is_rank() and (len(model_dirs) > 1 or _is_checkpoint(found_models[0].model_dir)):
        raise UserError("eval under torchrun takes one Hugging Face directory: leave torchrun out and give --nproc")
    results: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        found = Path(folder) / "results.jsonl"
        for number, (model, (tasks, reader)) in enumerate(zip(found_models, forms, strict=True)):
            answers = out / f"generations-{number}.jsonl" if out else None
            job = EvalJob(
                str(_as_model(model.model_dir, Path(folder) / f"model-{number}")),
                tasks,
                problems,
                sampling,
                reader,
                None if answers is None else str(answers),
                str(found),
                tensor_parallel,
            )
            if code := on_ranks(nproc, "eval", job.to_json()):
                return code
            lines = found.read_text().splitlines() if found.exists() else []  # rank 0 writes them
            results += [{**json.loads(line), "model": str(model_dirs[number])} for line in lines]
    if out and results:
        write_rows(out / "eval.jsonl", results)
    if results:
        table_console().print(results_table(results))
        where = f"results: {out / 'eval.jsonl'}, answers: {out}/generations-*.jsonl" if out else "--out DIR keeps them"
        typer.echo(where, err=True)
    for line in results:
        for note in unreadable_notes(line["task"], readable(line), "--extract", line["model"]):
            typer.echo(note, err=True)
    return 0


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Of a run: RUN_DIR/checkpoints/….")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the Hugging Face directory goes.")],
) -> int:
    """Write a checkpoint as a Hugging Face directory, which transformers and vLLM load."""
    if not checkpoint.is_dir():
        raise UserError(f"CHECKPOINT = {str(checkpoint)!r}: there is no such directory; give RUN_DIR/checkpoints/…")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"OUT_DIR = {str(out_dir)!r} is there already: choose a new directory")
    code = on_ranks(1, "export", str(checkpoint), str(out_dir))
    if code == 0 and not is_rank():
        print(f"student: {out_dir}, for transformers and vLLM")
    return code


def convert(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face directory, weights pickled.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the directory with safetensors goes.")],
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read the pickle (its tensors only).")] = False,
) -> int:
    """Turn pickled weights, which nothing else here reads, into safetensors."""
    from prune_opd.weights.convert import convert_pickle

    with shown("converting"):
        convert_pickle(model_dir, out_dir, allow_pickle)
    print(f"safetensors: {out_dir}")
    return 0


def _as_model(path: Path, folder: Path) -> Path:
    """A Hugging Face directory as it is; of a checkpoint, its student in `folder`."""
    if not _is_checkpoint(path):
        return path
    if code := on_ranks(1, "export", str(path), str(folder)):
        raise UserError(f"MODEL_DIR = {str(path)!r}: the checkpoint could not be exported (exit code {code})")
    return folder


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file()
