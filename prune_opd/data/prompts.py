"""Where prompts come from: the source that a setting names, and held-out problems.

    make_sampler(config.data, tokenizer, seed, max_prompt_len) ─▶ .next(n) ─▶ n Prompts

tasks.py has the procedural tasks, files.py the prompt files, sampler.py the order.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prune_opd.config import DataConfig
from prune_opd.config.run import RESULT_SUFFIXES
from prune_opd.data.files import FileSource
from prune_opd.data.hint import hint_limit
from prune_opd.data.ledger import Ledger, encode, random_stream
from prune_opd.data.prompt import Prompt, PromptSource, Tokenizer
from prune_opd.data.routing import Route, check_rows
from prune_opd.data.rows import FORMATS
from prune_opd.data.sampler import MixtureSampler, PromptSampler, Sampler
from prune_opd.data.tasks import GYM, LedgerSource, ReasoningGymSource
from prune_opd.errors import ConfigError

PROCEDURAL_SOURCES = (Ledger.name,)
LOOKED_AT = 1000  # first prompts of a source among which a teacher's are looked for


def source_problem(field: str, source: str) -> str | None:
    """Why there is no such source, in one line; None if there is. Reads nothing and imports nothing."""
    if source in PROCEDURAL_SOURCES or source.startswith(GYM):
        return None
    path, formats = Path(source), " or ".join(FORMATS)
    tasks = ", ".join(map(repr, PROCEDURAL_SOURCES))
    if path.is_dir() or (path.suffix in FORMATS and path.is_file()):
        return None
    if path.is_file():
        return f"{field} = {source!r} is not a {formats} file: convert it to one JSON object a line"
    if path.suffix or os.sep in source or path.exists():
        return (
            f"{field} = {source!r}: there is no such file; give the path of a {formats} file or of a dataset "
            f"directory, or a task ({tasks}, {GYM}NAME)"
        )
    near = difflib.get_close_matches(source.lower(), PROCEDURAL_SOURCES, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"give {tasks}"
    return f"{field} = {source!r} is no task: {remedy} (or {GYM}NAME, or a path)"


def make_sampler(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    max_prompt_len: int | None = None,
    *,
    extract: str = "box",
    route: Route | None = None,
) -> Sampler:
    """The sampler of training, over `data.source` or `data.mixture`. ConfigError, extract: see `make_source`.

    route: gives each prompt its teacher, of several; ConfigError for a row of a file that has none.
    """
    found = [
        make_source(replace(data, source=source), tokenizer, seed, max_prompt_len, extract=extract)
        for source in data.sources
    ]
    if route is not None:
        for entry, source in zip(data.sources, found, strict=True):
            check_rows(source, entry, route)
    finish = [{} if route is None else {"finish": partial(route, entry)} for entry in data.sources]
    samplers = [PromptSampler(source, seed, data.shuffle, **of) for source, of in zip(found, finish, strict=True)]
    return MixtureSampler(samplers, data.weights or [1.0] * len(samplers)) if data.mixture else samplers[0]


def task_name(source: str) -> str:
    """The name of a source's results: of a file that without its ending, so that charts can say `aime24`."""
    path = Path(source)
    return path.stem if path.suffix in FORMATS else source if source.startswith(GYM) else path.name or source


def doubled_names(field: str, sources: Sequence[str]) -> list[str]:
    """A line for each name that several sources have, or that a result of another has: their results would be one."""
    by_name: dict[str, list[str]] = {}
    for source in sources:
        by_name.setdefault(task_name(source), []).append(source)
    found = [
        f"{field} has several tasks named {name!r} ({', '.join(map(repr, same))}): rename one, or their results are one"
        for name, same in by_name.items()
        if len(same) > 1
    ]
    taken = {f"{name}{suffix}": name for name in by_name for suffix in RESULT_SUFFIXES}
    for name in by_name.keys() & (taken.keys() | {"response_length"}):
        other = f"a result of the task {taken[name]!r}" if name in taken else "the mean length of all responses"
        found.append(f"{field} has a task named {name!r} ({by_name[name][0]!r}), as {other} is called: rename it")
    return found


def sources(sampler: Sampler) -> list[PromptSource]:
    """The sources of a sampler."""
    return [one.source for one in _single(sampler)]


def _single(sampler: Sampler) -> list[PromptSampler]:
    found = sampler.samplers if isinstance(sampler, MixtureSampler) else [sampler]
    return [one for one in found if isinstance(one, PromptSampler)]


def file_sources(sampler: Sampler) -> list[FileSource]:
    """The prompt files among them."""
    return [source for source in sources(sampler) if isinstance(source, FileSource)]


def make_source(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    max_prompt_len: int | None = None,
    *,
    stream: str = "train",
    extract: str = "box",
) -> LedgerSource | ReasoningGymSource | FileSource:
    """The source that `data.source` names: a procedural task (made with `seed`), a file or a dataset directory.

    stream: of a procedural task's problems, "train" or "held_out". extract: how answers are read (EvalConfig); the
    ledger has a form of its own.

    Raises:
        ConfigError: there is no such task or file, or a prompt does not fit `max_prompt_len`.
    """
    if problem := source_problem("data.source", data.source):
        raise ConfigError(problem)
    if data.source == Ledger.name:
        source = LedgerSource(tokenizer, data, seed, stream=stream)
        longest = source.task.max_prompt_len
        if max_prompt_len is not None and longest > max_prompt_len:
            raise ConfigError(
                f"data.max_steps = {data.max_steps} makes prompts of up to {longest} tokens, rollout.max_prompt_len is "
                f"{max_prompt_len}: raise it to {longest}, or take data.max_steps <= {(max_prompt_len - 3) // 2}"
            )
        source.check_hints(hint_limit(data, max_prompt_len))
        return source
    if data.source.startswith(GYM):
        return ReasoningGymSource(data, tokenizer, seed, max_prompt_len, stream=stream, extract=extract)
    return FileSource(data, tokenizer, max_prompt_len, extract=extract)


def reference_text(source: PromptSource, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids that stand before, ids of a text that any teacher of this source finds likely), for one of its prompts.

    A worked solution without errors where the task has one (the ledger, a reasoning-gym task in its words); else the
    prompt itself after its first token.
    """
    prompt = source.get(index)
    if isinstance(source, ReasoningGymSource) and (worked := source.worked(index)):
        return prompt.ids, worked
    if not isinstance(source, LedgerSource):
        return prompt.ids[:1], prompt.ids[1:]
    return prompt.ids, tuple(encode(source.solution(source.task.problem(source.seed, index, source.stream))))


def reference_texts(
    sampler: Sampler, count: int, teacher: str
) -> tuple[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The name of a source, and the reference text of its first `count` prompts (fewer, if it has not so many).

    teacher: whose prompts, of several: the first source that has any of its among the first `LOOKED_AT`.
    """
    source = sampler.source
    found = list(range(min(count, source.size or count)))
    for one in _single(sampler) if teacher else ():
        source = one.source
        first = range(min(LOOKED_AT, source.size or LOOKED_AT))
        found = [index for index in first if one.finish(source.get(index)).teacher == teacher][:count]
        if found:
            break
    return source.name, [reference_text(source, index) for index in found]


def held_out(
    data: DataConfig, tokenizer: Tokenizer, seed: int, n: int, max_prompt_len: int | None = None
) -> list[Prompt]:
    """`n` evaluation problems with answers, the same ones for the same `seed`.

    A procedural task has a stream of its own for them, from which no training run draws, whatever its seed. Of a file
    they are `n` rows in file order, or all if there are fewer; so it must be another file than the training one.

    Raises:
        ConfigError: as `make_source`, or a row has no answer.
    """
    source = make_source(data, tokenizer, seed, max_prompt_len, stream="held_out")
    if source.size is None:
        return [source.get(index) for index in range(n)]
    source.need_answers("accuracy cannot be measured on this file", "or name an evaluation file (evaluation.sources)")
    order = random_stream("held_out_choice", seed, 0).permutation(source.size)
    return [source.get(index) for index in sorted(order[:n].tolist())]
