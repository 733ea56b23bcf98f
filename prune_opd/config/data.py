"""Where prompts come from, and what the teacher reads in their place."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Interval

from prune_opd.config.checks import Checked, Count, between
from prune_opd.errors import ConfigError

# What a procedural problem has as columns (data/tasks.py fills them). Of a file the rows say it themselves.
LEDGER_FIELDS = ("prompt", "answer", "solution")
GYM_FIELDS = ("prompt", "question", "answer")


def procedural_fields(source: str) -> tuple[str, ...]:
    """The columns of a procedural task's problems; none where `source` is no such task."""
    return LEDGER_FIELDS if source == "ledger" else GYM_FIELDS if source.startswith("reasoning_gym/") else ()


def hint_fields(template: str) -> list[str]:
    """The columns that `data.teacher_prompt` names, each once: those in braces, or without braces the one it is.

    Raises:
        ConfigError: the braces do not match, or hold anything but a column's name.
    """
    if not {"{", "}"}.intersection(template):
        if template.strip() != template or not template:
            raise ConfigError(
                f"data.teacher_prompt = {template!r} is no column's name: give one, or a text with {{prompt}}"
            )
        return [template]
    double = "a brace of the text itself is written twice, {{ or }}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"data.teacher_prompt = {template!r}: {error}; {double}") from error
    named = [(name, form, conversion) for _, name, form, conversion in parts if name is not None]
    for name, form, conversion in named:
        if not name or form or conversion:
            inside = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ConfigError(
                f"data.teacher_prompt = {template!r}: {{{inside}}} is no column's name; write {{prompt}}, and {double}"
            )
    if not named:
        raise ConfigError(f"data.teacher_prompt = {template!r} names no column: it would be the same text in every row")
    return list(dict.fromkeys(name for name, _, _ in named))


@dataclass(frozen=True)
class DataConfig(Checked, name="data"):
    """Where prompts come from and how rows of files become prompts (data/ has the formats)."""

    source: str = "ledger"  # ledger | reasoning_gym/TASK | a .jsonl or .parquet file | a dataset directory
    mixture: tuple[str, ...] = ()  # several sources instead, in the proportions of `weights`
    weights: tuple[float, ...] = ()  # proportions of the mixture's sources; none: all equal
    min_steps: Annotated[int, Interval(ge=1, le=40)] = 20  # ledger: fewest bookings of a problem
    max_steps: Annotated[int, Interval(ge=1, le=40)] = 40  # ledger: most bookings of a problem
    shuffle: bool = True  # read a file's rows in another order each epoch
    split: str | None = None  # which split of a dataset directory that has several; null: train
    chat: bool | None = None  # files: use the chat template; null: for "messages", "problem", "question", not "prompt"
    system_prompt: str | None = None  # stands before the turns, where the chat template is used
    suffix: str = ""  # stands after the last user turn, or after the prompt
    thinking: bool | None = None  # the chat template's switch of that name, where it has one
    # bad rows of a file: refuse (with line numbers) | skip (and say how many, and where)
    bad_rows: Literal["refuse", "skip"] = "refuse"
    teacher_column: str | None = None  # files: the column that names a row's teacher, of several; null: by its source
    # what the teacher reads in place of the prompt: a column of the row, or a text with columns in braces
    # ("{prompt} Solution: {solution}"); null: the student's prompt
    teacher_prompt: str | None = None
    max_teacher_prompt_len: Count | None = None  # tokens of the teacher's prompt; null: rollout.max_prompt_len

    def __post_init__(self) -> None:
        super().__post_init__()
        between("data.max_steps", self.max_steps, self.min_steps, 40)
        if self.weights and len(self.weights) != len(self.mixture):
            raise ConfigError(
                f"data.weights has {len(self.weights)} numbers and data.mixture {len(self.mixture)} sources: give one "
                "weight for each source, or leave data.weights out"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ConfigError(
                f"data.weights = {list(self.weights)}: every weight is above 0; leave a source out instead"
            )

        for name in ("chat", "system_prompt", "suffix", "thinking") if "ledger" in self.sources else ():
            if (value := getattr(self, name)) != getattr(DataConfig, name):
                raise ConfigError(f"data.{name} = {value!r}: the ledger's problems are complete texts; leave it out")

        self._check_teacher_prompt()

    def _check_teacher_prompt(self) -> None:
        if self.teacher_prompt is None:
            if self.max_teacher_prompt_len is not None:
                raise ConfigError(
                    f"data.max_teacher_prompt_len = {self.max_teacher_prompt_len} with data.teacher_prompt = null: the "
                    "teacher reads the student's prompt; set data.teacher_prompt, or leave it out"
                )
            return
        named = hint_fields(self.teacher_prompt)
        for source in self.sources:
            known = procedural_fields(source)
            if known and (unknown := [name for name in named if name not in known]):
                raise ConfigError(
                    f"data.teacher_prompt = {self.teacher_prompt!r} names {', '.join(map(repr, unknown))}, and a "
                    f"problem of {source!r} has {', '.join(known)}: name one of those"
                )

    def without_hint(self) -> DataConfig:
        """The same without what is of teachers: for problems that none reads."""
        return replace(self, teacher_column=None, teacher_prompt=None, max_teacher_prompt_len=None)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that prompts are drawn from."""
        return self.mixture or (self.source,)
