"""The teacher's prompt where it is not the student's: a hint, such as the worked solution (`data.teacher_prompt`).

    row ─▶ teacher_row: the text, or the turns, that stand in the prompt's place ─▶ prompt_text, as the student's

So a chat template, a system prompt and a suffix do to the teacher's prompt what they do to the student's. Of "messages"
the last user's turn is replaced, and the turns before it stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prune_opd.config import DataConfig
from prune_opd.config.data import hint_fields
from prune_opd.data.prompt import Prompt, Tokenizer
from prune_opd.data.render import SettingError, answer_of, encode_text, excerpt, prompt_of, prompt_text
from prune_opd.data.rows import Row
from prune_opd.errors import ConfigError


def with_hint(prompt: Prompt, row: Row, data: DataConfig, tokenizer: Tokenizer, limit: int | None) -> Prompt:
    """The prompt with the ids that the teacher reads; as it is without `data.teacher_prompt`.

    row: what the prompt was made of. limit: most tokens, None: any number.

    Raises:
        ConfigError: the row lacks a column that the setting names, its value is no text, or the result is too long.
    """
    if data.teacher_prompt is None:
        return prompt
    try:
        ids = encode_text(prompt_text(teacher_row(row, data.teacher_prompt), data, tokenizer), tokenizer)
    except SettingError:
        raise
    except ConfigError as error:
        raise ConfigError(f"data.teacher_prompt = {excerpt(data.teacher_prompt)}: {error}") from error
    return fitting(replace(prompt, teacher_ids=ids), limit)


def fitting(prompt: Prompt, limit: int | None) -> Prompt:
    """The prompt, whose teacher's ids are at most `limit`. ConfigError if they are more."""
    ids = prompt.teacher_ids or ()
    if limit is not None and len(ids) > limit:
        raise ConfigError(
            f"the teacher's prompt (data.teacher_prompt) has {len(ids)} tokens, data.max_teacher_prompt_len is "
            f"{limit}: raise it, shorten the hint, or remove the row"
        )
    return prompt


def hint_limit(data: DataConfig, max_prompt_len: int | None) -> int | None:
    """Most tokens of a teacher's prompt. max_prompt_len: of a student's."""
    return max_prompt_len if data.max_teacher_prompt_len is None else data.max_teacher_prompt_len


def filled(template: str, fields: Row) -> str:
    """The template with the fields of a problem that has all of them, as texts."""
    names = hint_fields(template)
    return str(fields[template]) if names == [template] else template.format(**{name: fields[name] for name in names})


def teacher_row(row: Row, template: str) -> Row:
    """The row of a file as the teacher gets it. ConfigError: see `with_hint`."""
    column, value = prompt_of(row)
    fields = {name.lower(): found for name, found in row.items() if found is not None} | {"prompt": value}
    turns = value if column == "messages" and isinstance(value, list) else None
    last = max((i for i, turn in enumerate(turns or ()) if _of_user(turn)), default=None)
    if turns is not None and last is not None:
        fields["prompt"] = turns[last].get("content")
    found = {name: _field(name, fields, row) for name in hint_fields(template)}
    text = found[template] if template in found else template.format(**found)
    if isinstance(text, list):  # a column of turns
        return {"messages": text}
    if turns is None or last is None:
        return {column: text}
    return {"messages": [*turns[:last], {**turns[last], "content": text}, *turns[last + 1 :]]}


def _field(name: str, fields: Row, row: Row) -> Any:
    """A column's value as text; turns are a list, which can stand by itself only."""
    if name.lower() not in fields:
        if name.lower() in {column.lower() for column in row}:
            raise ConfigError(f'"{name}" is null in this row: fill it, or leave the row out')
        raise SettingError(
            f'data.teacher_prompt names the column "{name}", which the row lacks: add it, or name one that is there'
        )
    value = answer_of(row) if name.lower() == "answer" else fields[name.lower()]
    if isinstance(value, list):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ConfigError(f'"{name}" = {excerpt(value)}: give text that is not empty, or a number')
    return str(value)


def _of_user(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "user"
