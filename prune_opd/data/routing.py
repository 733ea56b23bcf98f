"""Which of several teachers a prompt has: by the row's own column, its source, or where it is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from prune_opd.config import TrainConfig
from prune_opd.config.teachers import by_source, teacher_of_source
from prune_opd.data.files import FileSource
from prune_opd.data.prompt import Prompt, PromptSource
from prune_opd.errors import ConfigError

Route = Callable[[str, Prompt], Prompt]  # (entry of data.source or data.mixture, prompt) → it with its teacher


def make_route(config: TrainConfig) -> Route | None:
    """How prompts get their teachers; None where there is one for all.

    A row's own column (`data.teacher_column`) comes first, then its "source", then the entry of the data.
    """
    if not config.teachers:
        return None
    taught, known = by_source(config.teachers), ", ".join(config.teachers)

    def route(entry: str, prompt: Prompt) -> Prompt:
        teacher = prompt.teacher or taught.get(prompt.source) or teacher_of_source(taught, entry)
        if teacher is None:
            raise ConfigError(
                f"no teacher has the source {prompt.source!r}: name it in teachers.NAME.sources (teachers: {known})"
            )
        if teacher not in config.teachers:
            raise ConfigError(
                f"{config.data.teacher_column} = {teacher!r} is no teacher: give one of {known}, or add it to teachers"
            )
        return replace(prompt, teacher=teacher)

    return route


def check_rows(source: PromptSource, entry: str, route: Route) -> None:
    """ConfigError with the file and number of the first row that has no teacher, and how many there are."""
    if not isinstance(source, FileSource):
        return
    problems = []
    for place, prompt in zip(source.places, source.prompts, strict=True):
        try:
            route(entry, prompt)
        except ConfigError as error:
            problems.append(f"{place}: {error}")
    if problems:
        more = f" (so in {len(problems)} of {source.size} rows)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}")
