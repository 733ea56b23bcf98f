"""`prune-opd data`: show prompts as a model gets them, and convert published files to files of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prune_opd.config import DataConfig
from prune_opd.data.files import FileSource
from prune_opd.data.prompt import Tokenizer
from prune_opd.data.prompts import make_source
from prune_opd.data.render import excerpt
from prune_opd.data.rows import Row, read_rows
from prune_opd.errors import ConfigError, UserError
from prune_opd.process import progress

BINS, BAR = 12, 40  # rows of the histogram, and characters of its longest bar
ENDLESS = 256  # prompts of an endless task that are read


def inspect(data: DataConfig, tokenizer: Tokenizer, shown: int, max_prompt_len: int | None, console: Console) -> None:
    """Print `shown` prompts as the model gets them, with answers and sources; then the lengths in tokens, and bad rows.

    Raises:
        ConfigError: there is no such source; or there are bad rows and data.bad_rows=refuse.
    """
    source = make_source(data, tokenizer, 0, max_prompt_len)
    prompts = [source.get(index) for index in range(source.size or ENDLESS)]
    for prompt in prompts[:shown]:
        console.rule(f"{prompt.source} #{prompt.index}: {len(prompt.ids)} tokens, answer {excerpt(prompt.answer)}")
        console.print(Text(tokenizer.decode(list(prompt.ids))))
        if prompt.teacher_ids is not None:
            console.print(Text(f"the teacher reads {len(prompt.teacher_ids)} tokens:"), style="bold")
            console.print(Text(tokenizer.decode(list(prompt.teacher_ids))))
    console.rule(f"{len(prompts)} prompts" + ("" if source.size else f", the first of the endless {source.name}"))
    console.print(length_table([len(prompt.ids) for prompt in prompts]))
    if hints := [len(prompt.teacher_ids) for prompt in prompts if prompt.teacher_ids is not None]:
        console.rule("what the teacher reads")
        console.print(length_table(hints))
    without = sum(prompt.answer is None for prompt in prompts)
    if without:
        console.print(f"{without} of them have no answer: accuracy cannot be measured on those", style="yellow")
    for note in source.notes() if isinstance(source, FileSource) else ():
        console.print(Text(note), style="yellow")


def length_table(lengths: list[int]) -> Table:
    """A histogram of prompt lengths, with the share of the prompts up to each bin's end."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    table = Table("tokens", "prompts", "up to here", "")
    below = 0
    for i, count in enumerate(counts):
        below += count
        first, last = low + i * width, low + (i + 1) * width - 1
        bar = "█" * round(BAR * count / max(counts))
        table.add_row(f"{first}–{last}" if last > first else str(first), str(count), f"{below / len(lengths):.1%}", bar)
    return table


def convert(layout: str, path: Path, out: Path) -> int:
    """Write the rows of a published file as prompts (JSON lines), each only once. Returns how many there are.

    Raises:
        ConfigError: there is no such layout, or a row lacks its columns.
        UserError: `out` exists already.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"LAYOUT = {layout!r} is not known: choose one of {', '.join(LAYOUTS)}")
    if out.exists():
        raise UserError(f"OUT = {str(out)!r} is there already: choose a new file")
    rows = list(dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in _converted(LAYOUTS[layout], path)))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    unfinished.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(out)
    return len(rows)


def _converted(of_row: Callable[[Row], Row], path: Path) -> Iterator[Row]:
    for file, number, row in read_rows(path):
        if isinstance(row, ConfigError):
            raise ConfigError(f"{file}:{number}: {row}")
        progress(partial("{}, row {:,}".format, file, number))
        try:
            yield of_row(row)
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{file}:{number}: the row lacks a column of that layout ({_brief(error)}): give the file as it was "
                "published"
            ) from error


def _brief(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else "one of its columns has another form"


DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def _dapo_math_17k(row: Row) -> Row:
    """Its columns: data_source, prompt (one user turn), reward_model.ground_truth, extra_info.

    DAPO's instruction around each problem asks for another form of answer. It is removed, so that `data.suffix` can
    ask for a box. (The published file has every problem about a hundred times.)
    """
    if len(row["prompt"]) != 1:
        raise IndexError(f"{len(row['prompt'])} turns instead of one")
    (turn,) = row["prompt"]
    problem = str(turn["content"]).removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    return {"problem": problem, "answer": str(row["reward_model"]["ground_truth"]), "source": str(row["data_source"])}


LAYOUTS: dict[str, Callable[[Row], Row]] = {"dapo-math-17k": _dapo_math_17k}
"""Published layouts: how a row of each becomes a prompt."""
