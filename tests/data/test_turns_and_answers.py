"""From a row's turns and answer to what a model reads and is scored by: turns, suffix, templates, numbers."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from prune_opd.data.render import answer_of, prompt_text
from prune_opd.errors import ConfigError
from tests.data.test_prompt_files import file_source, of_file, write_jsonl, write_parquet

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "What is 1 + 1?"}
SAID = {"role": "assistant", "content": "The answer is 2."}


@pytest.mark.parametrize(
    ("turns", "before", "after"),
    [
        ([ASK, SAID], [ASK], []),
        ([ASK, SAID, SAID], [ASK], []),
        (
            [ASK, SAID, {"role": "user", "content": "Sure?"}, SAID],
            [ASK, SAID, {"role": "user", "content": "Sure?"}],
            [],
        ),
        ([ASK, SAID, {"role": "tool", "content": "2"}], [ASK], [SAID, {"role": "tool", "content": "2"}]),
        ([{"role": "system", "content": ""}, ASK, SAID], [{"role": "system", "content": ""}, ASK], []),
        ([ASK, {"role": "system", "content": "Be brief."}], [ASK], [{"role": "system", "content": "Be brief."}]),
    ],
)
def test_a_prompt_ends_before_the_answer_and_the_suffix_is_in_the_last_user_turn(
    turns: list[Any], before: list[Any], after: list[Any], byte_tokenizer: Any
) -> None:
    byte_tokenizer.chat_template = CHATML
    asked = [*before[:-1], {**before[-1], "content": before[-1]["content"] + " In a box."}, *after]
    wanted = byte_tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt_text({"messages": turns}, of_file(suffix=" In a box."), byte_tokenizer) == wanted
    assert wanted.count("<|im_start|>assistant") == 1 + sum(turn["role"] == "assistant" for turn in asked)


def test_rows_whose_answer_was_left_out_of_the_prompt_are_counted(byte_tokenizer: Any, tmp_path: Path) -> None:
    byte_tokenizer.chat_template = CHATML
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [ASK, SAID], "answer": "2"}, {"messages": [ASK]}])
    (note,) = file_source(path, byte_tokenizer).notes()
    assert "1 of 2 rows end with an assistant's turn" in note


@pytest.mark.parametrize("turns", [[SAID], [{"role": "system", "content": "Be brief."}, SAID]])
def test_turns_without_a_user_are_refused(turns: list[Any], byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = CHATML
    with pytest.raises(ConfigError, match="there is no user's turn"):
        prompt_text({"messages": turns}, of_file(), byte_tokenizer)


@pytest.mark.parametrize("role", ["Assistant", "ASSISTANT", " assistant", "gpt", "model", "bot", "critic", "\ud800"])
def test_an_answer_under_another_role_is_refused_and_not_left_in_the_prompt(role: str, byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = CHATML
    with pytest.raises(ConfigError, match=r'^"messages" have a turn of .*: a role is one of system, .*assistant'):
        prompt_text({"messages": [ASK, {"role": role, "content": "The answer is 2."}]}, of_file(), byte_tokenizer)


@pytest.mark.parametrize("content", ["", "Be brief."])
def test_a_system_turn_behind_the_answer_is_refused(content: str, byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = CHATML
    end = {"role": "system", "content": content}
    with pytest.raises(ConfigError, match="end with a system turn behind the assistant's"):
        prompt_text({"messages": [ASK, SAID, end]}, of_file(), byte_tokenizer)
    rounds = [ASK, SAID, ASK, end]
    assert "Sure" not in prompt_text({"messages": rounds}, of_file(), byte_tokenizer)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Decimal("0.50"), "0.50"),
        (Decimal("1E+3"), "1000"),
        (Decimal("NaN"), None),
        ("\u200b", None),
        (" \u00a0\ufeff", None),
        (0.00001, "0.00001"),
        (1e20, "100000000000000000000"),
        (2.5e16, "25000000000000000"),
        (-1e-7, "-0.0000001"),
        (0.1, "0.1"),
        (2.0, "2.0"),
        (7, "7"),
        ("1e-05", "1e-05"),
        (float("nan"), None),
        (None, None),
        ("", None),
        (" \n", None),
    ],
)
def test_an_answer_that_is_a_number_keeps_its_digits_and_nothing_is_no_answer(answer: Any, text: str | None) -> None:
    assert answer_of({"prompt": "?", "Answer": answer}) == text


def test_an_answer_or_a_source_that_is_no_text_is_a_bad_row(byte_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no text"):
        answer_of({"prompt": "?", "answer": "\ud800"})
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "?", "answer": "1", "source": "\ud800"}])
    with pytest.raises(ConfigError, match=r'"source" = .* is no text'):
        file_source(path, byte_tokenizer)


def test_columns_that_differ_in_case_alone_are_one_or_the_row_is_refused(byte_tokenizer: Any) -> None:
    assert answer_of({"Answer": None, "answer": "2"}) == "2"
    with pytest.raises(ConfigError, match="the row has several of \"answer\": '3', '2'; give one"):
        answer_of({"Answer": "3", "answer": "2"})
    with pytest.raises(ConfigError, match=r"the row has several of .*: problem, problem; give one"):
        prompt_text({"Problem": "a", "problem": "b"}, of_file(), byte_tokenizer)
    assert prompt_text({"Prompt": None, "prompt": "b"}, of_file(), byte_tokenizer) == "b"


def test_float32_numbers_of_parquet_are_what_was_written(byte_tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in (pa.float32(), pa.float64()):
        values = pa.array([0.1, 2.5e16, 1e-5, None], kind)
        pq.write_table(pa.table({"problem": ["?"] * 4, "answer": values}), tmp_path / "a.parquet")
        answers = [prompt.answer for prompt in file_source(tmp_path / "a.parquet", byte_tokenizer).prompts]
        assert answers == ["0.1", "25000000000000000", "0.00001", None]


def test_named_templates_without_a_default_are_refused_where_one_is_needed(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    for row, data in (
        ({"question": "?"}, of_file()),
        ({"prompt": "?"}, of_file(chat=True)),
        ({"messages": [ASK]}, of_file()),
    ):
        with pytest.raises(ConfigError, match="chat templates called 'tool_use', 'rag' and none called 'default'"):
            prompt_text(row, data, byte_tokenizer)
    assert prompt_text({"prompt": "?"}, of_file(), byte_tokenizer) == "?"
    assert prompt_text({"question": "?"}, of_file(chat=False), byte_tokenizer) == "?"


def test_numbers_of_parquet_and_of_json_lines_are_read_alike(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": value} for value in (1e-5, 2.5e16, float("nan"))]
    files = write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)
    for path in files:
        assert [prompt.answer for prompt in file_source(path, byte_tokenizer).prompts] == [
            "0.00001",
            "25000000000000000",
            None,
        ]


def test_of_several_named_templates_the_default_one_counts(byte_tokenizer: Any) -> None:
    switch = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    byte_tokenizer.chat_template = {"default": switch, "tool_use": "{{ messages[0].content }}"}
    for thinking in (False, True, None):
        options = {} if thinking is None else {"enable_thinking": thinking}
        wanted = byte_tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True, **options)
        assert prompt_text({"question": ASK["content"]}, of_file(thinking=thinking), byte_tokenizer) == wanted
    byte_tokenizer.chat_template = {"default": CHATML, "tool_use": switch}
    with pytest.raises(ConfigError, match="has no such switch"):
        prompt_text({"question": "?"}, of_file(thinking=False), byte_tokenizer)
