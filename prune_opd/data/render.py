"""From a row of a file to a prompt's text: column names, chat template, system prompt, suffix.

A row has its prompt in one of `PROMPT_COLUMNS` and, if it is to be scored, its answer in `answer`; upper and lower case
do not matter, which covers the published files of AMC23, AIME24/25 and HMMT24/25. The text in "prompt" is complete as
it is. The text in "problem" or "question" is a user's turn, and goes through the chat template if there is one.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from prune_opd.config import DataConfig
from prune_opd.data.prompt import Tokenizer
from prune_opd.data.rows import Row
from prune_opd.errors import ConfigError

PROMPT_COLUMNS = ("prompt", "messages", "problem", "question")
# Whose turns templates know. Under any other name ("Assistant", "gpt") an answer at the end would stay in the prompt.
ROLES = (
    *("system", "developer", "user", "assistant"),
    *("tool", "function", "ipython", "observation", "environment"),  # what a call gave back
)
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # blank characters that `strip` leaves


class SettingError(ConfigError):
    """A setting, or the tokenizer, that does not go with a row: it is said once for all rows that it is true of."""


def prompt_text(row: Row, data: DataConfig, tokenizer: Tokenizer) -> str:
    """The prompt of a row, up to where the response begins, as chat, system_prompt, suffix and thinking of `data` ask.

    Raises:
        ConfigError: naming the column and what would be right.
    """
    column, value = prompt_of(row)
    if column == "messages":
        turns = _turns(value)
    else:
        if not isinstance(value, str) or not value.strip():
            hint = ' (chat turns go under "messages")' if isinstance(value, list) else ""
            raise ConfigError(f'"{column}" = {excerpt(value)}: give text that is not empty{hint}')
        turns = [{"role": "user", "content": value}]
    wanted = column != "prompt" if data.chat is None else data.chat
    template = wanted and bool(_template(tokenizer))
    if data.chat and not template:
        raise SettingError("data.chat = true needs a chat template, which the model's tokenizer lacks: leave it out")
    if template:
        return _render(turns, data, tokenizer)
    if column == "messages":
        raise SettingError(
            '"messages" need a chat template, which the model\'s tokenizer lacks: give "prompt" instead'
            if data.chat is None
            else f'data.chat = {data.chat}: "messages" need the chat template; leave data.chat out'
        )
    for name in ("system_prompt", "thinking"):
        if getattr(data, name) is not None:
            raise SettingError(
                f"data.{name} = {excerpt(getattr(data, name))} has no place in a prompt that does not go through "
                "the chat template: set data.chat=true, or leave it out"
            )
    return str(turns[-1]["content"]) + data.suffix


def _render(turns: list[Row], data: DataConfig, tokenizer: Tokenizer) -> str:
    if data.thinking is not None and "enable_thinking" not in _template(tokenizer):
        raise SettingError(
            f"data.thinking = {data.thinking}: the tokenizer's chat template has no such switch; leave it out"
        )
    if data.suffix:
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turns = [*turns[:last], {**turns[last], "content": turns[last]["content"] + data.suffix}, *turns[last + 1 :]]
    if data.system_prompt is not None:
        if turns[0]["role"] == "system":
            raise SettingError("data.system_prompt is set, and the row has a system turn of its own: leave one out")
        turns = [{"role": "system", "content": data.system_prompt}, *turns]
    options = {} if data.thinking is None else {"enable_thinking": data.thinking}
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # a template is a program of the model's author: it may raise what it likes
        raise ConfigError(f'the chat template does not take these "messages" ({error})') from error
    return str(rendered)


def _template(tokenizer: Tokenizer) -> str:
    """The chat template that `apply_chat_template` takes: of several with names the default; "" if there is none.

    SettingError if there are several and none is the default: transformers takes none of them either.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and template and "default" not in template:
        raise SettingError(
            f"the model's tokenizer has chat templates called {', '.join(map(repr, template))} and none called "
            "'default': give one that name"
        )
    return str((template.get("default") if isinstance(template, dict) else template) or "")


def encode_text(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a prompt's text. ConfigError if the tokenizer cannot encode it, or gives no tokens."""
    try:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # `tokenizers` has no exception of its own for text outside the vocabulary
        raise ConfigError(f"the model's tokenizer cannot encode the prompt {excerpt(text)} ({error})") from error
    if not ids:
        raise ConfigError("the prompt is empty: the tokenizer makes no tokens of it")
    return ids


def prompt_of(row: Row) -> tuple[str, Any]:
    """The column with a row's prompt, and its value. ConfigError if there is none, or more than one."""
    given = [(name.lower(), value) for name, value in row.items() if value is not None]
    found, columns = [name for name, _ in given if name in PROMPT_COLUMNS], dict(given)
    if len(found) != 1:
        number = "several" if found else "none"
        raise ConfigError(
            f'the row has {number} of "prompt" (a text), "messages" (chat turns), "problem" and "question" (a user\'s '
            f"turn){': ' + ', '.join(found) if found else ''}; give one"
        )
    return found[0], columns[found[0]]


def answer_of(row: Row) -> str | None:
    """A row's reference answer as text; None if there is none: left out, null, NaN or blank.

    A number is written with all its digits, never as 1e-05. ConfigError if it is neither a text nor a number.
    """
    given = [value for name, value in row.items() if name.lower() == "answer" and value is not None]
    if len(given) > 1:
        raise ConfigError(f'the row has several of "answer": {", ".join(map(excerpt, given))}; give one')
    answer = given[0] if given else None
    if isinstance(answer, Decimal):  # of Parquet
        answer = None if answer.is_nan() else format(answer, "f")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise ConfigError(f'"answer" = {excerpt(answer)}: give a string or a number, or leave it out')
    if isinstance(answer, float) and math.isfinite(answer):
        answer = format(Decimal(repr(answer)), "f")
    if answer is None or answer != answer or not str(answer).strip().strip(INVISIBLE):
        return None
    return written("answer", str(answer))


def written(column: str, text: str) -> str:
    """A text that ends up in files, as it is. ConfigError if it is none: half a surrogate cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f'"{column}" = {excerpt(text)} is no text ({error.reason}): mend that character') from error
    return text


def ends_with_an_answer(row: Row) -> bool:
    """Whether the last of a row's "messages" is the assistant's: no part of the prompt."""
    column, value = prompt_of(row)
    return column == "messages" and isinstance(value, list) and bool(value) and _role(value[-1]) == "assistant"


def _turns(messages: Any) -> list[Row]:
    """The turns that a response follows: without those of the assistant at the end, which are a reference answer."""
    if not isinstance(messages, list) or not messages or not all(map(_is_turn, messages)):
        raise ConfigError(
            f'"messages" = {excerpt(messages)}: give a list of {{"role": "user", "content": "..."}}, none empty but a '
            "system turn"
        )
    turns = list(messages)
    if other := [turn["role"] for turn in turns if turn["role"] not in ROLES]:
        raise ConfigError(f'"messages" have a turn of {excerpt(other[0])}: a role is one of {", ".join(ROLES)}')
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    roles = [turn["role"] for turn in turns]
    if "user" not in roles:
        raise ConfigError(f'"messages" = {excerpt(messages)}: there is no user\'s turn to respond to; give one')
    if roles[-1] in ("system", "developer") and "assistant" in roles[len(roles) - roles[::-1].index("user") :]:
        raise ConfigError(
            f'"messages" end with a {roles[-1]} turn behind the assistant\'s, which would stay in the prompt: leave '
            "both out, or give a user's turn behind them"
        )
    return turns


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _is_turn(turn: Any) -> bool:
    role, content = _role(turn), turn.get("content") if isinstance(turn, dict) else None
    # An empty system turn is how one switches a template's own system prompt off.
    return isinstance(role, str) and isinstance(content, str) and (role == "system" or bool(content.strip()))


def excerpt(value: Any) -> str:
    """The beginning of a value, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
