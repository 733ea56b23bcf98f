"""What the teacher reads in place of the prompt: columns, templates, chat turns, limits; what a row lacks is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import CorpusConfig, DataConfig, SftConfig
from prune_opd.config.paths import config_digest, shipped_index, shipped_models_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.data import ledger
from prune_opd.data.hint import teacher_row
from prune_opd.data.prompts import held_out, make_sampler, make_source
from prune_opd.errors import ConfigError

HINT = "{prompt} {solution} <ask>"


class Letters:
    """A tokenizer of a letter a token, with a chat template that says who speaks."""

    chat_template = "turns"
    name_or_path = "letters"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def text_of(ids: tuple[int, ...] | None) -> str:
    assert ids is not None
    return "".join(map(chr, ids))


def source(tmp_path: Path, rows: list[dict[str, Any]], limit: int | None = None, **settings: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_source(DataConfig(source=str(path), **settings), Letters(), 0, limit)


@pytest.fixture(scope="module")
def of_ledger() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped_models_dir() / "student")


# ---------------------------------------------------------------------------------------------------- files


def test_a_template_goes_through_the_chat_template_with_the_suffix_as_the_students_prompt(tmp_path: Path) -> None:
    rows = [{"problem": "2+3", "Answer": 5, "solution": "two and three"}]
    hint = "{prompt} (it is {answer}: {solution}, {{so}})"
    prompt = source(tmp_path, rows, teacher_prompt=hint, suffix="!", system_prompt="sums").get(0)
    assert text_of(prompt.ids) == "<system>sums<user>2+3!<assistant>"
    assert text_of(prompt.teacher_ids) == "<system>sums<user>2+3 (it is 5: two and three, {so})!<assistant>"


def test_of_messages_the_last_users_turn_is_replaced(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "the answer"},
    ]
    prompt = source(tmp_path, [{"messages": turns, "hint": "h"}], teacher_prompt="{prompt}/{hint}").get(0)
    assert text_of(prompt.ids) == "<user>a<assistant>b<user>c<assistant>"
    assert text_of(prompt.teacher_ids) == "<user>a<assistant>b<user>c/h<assistant>"


def test_a_column_stands_in_the_prompts_place_as_text_or_as_turns(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "other": "q"}, {"prompt": "p", "other": [{"role": "user", "content": "q"}]}]
    found = source(tmp_path, rows, teacher_prompt="other")
    assert [text_of(found.get(i).teacher_ids) for i in range(2)] == ["q", "<user>q<assistant>"]


def test_without_the_setting_there_is_no_second_prompt(tmp_path: Path) -> None:
    assert source(tmp_path, [{"prompt": "p", "solution": "s"}]).get(0).teacher_ids is None


def test_a_row_without_the_column_is_refused_with_row_and_field(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "solution": "s"}, {"prompt": "p"}]
    with pytest.raises(ConfigError, match=r'rows.jsonl:2: data.teacher_prompt names the column "solution".*1 of 2'):
        source(tmp_path, rows, teacher_prompt="{prompt}{solution}")
    skipped = source(tmp_path, rows, teacher_prompt="{prompt}{solution}", bad_rows="skip")
    assert skipped.size == 1 and "line 2" in skipped.notes()[0]


@pytest.mark.parametrize(
    ("value", "problem"), [(None, "is null in this row"), ("  ", "text that is not empty"), ({"a": 1}, "give text")]
)
def test_a_value_that_is_no_text_is_refused_with_row_and_field(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf'rows.jsonl:1: data.teacher_prompt = .*"solution" .*{problem}'):
        source(tmp_path, [{"prompt": "p", "solution": value}], teacher_prompt="{prompt}{solution}")


def test_a_hint_longer_than_its_limit_is_refused_with_row_and_field(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "hint": "short"}, {"prompt": "p", "hint": "much longer"}]
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: the teacher's prompt .* has 11 tokens, .*len is 8"):
        source(tmp_path, rows, limit=4, teacher_prompt="hint", max_teacher_prompt_len=8)
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: the teacher's prompt .* has 5 tokens, .*len is 4"):
        source(tmp_path, rows, limit=4, teacher_prompt="hint")  # the student's limit
    assert source(tmp_path, rows, limit=4, teacher_prompt="hint", max_teacher_prompt_len=11).size == 2


def test_check_finds_the_missing_column_without_a_tokenizer(tmp_path: Path) -> None:
    from prune_opd.check.machine import prompt_problems

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "solution": "s"}\n{"prompt": "p"}\n')
    (problem,) = prompt_problems("data", str(path), None, hint="{prompt} {solution}")
    assert "rows.jsonl:2" in problem and '"solution"' in problem
    assert prompt_problems("data", str(path), None) == []


def test_a_row_is_not_changed() -> None:
    row = {"messages": [{"role": "user", "content": "c"}]}
    teacher_row(row, "{prompt}/x")
    assert row == {"messages": [{"role": "user", "content": "c"}]}


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("hint", "problem"),
    [
        ("{prompt} \\boxed{}", "is no column's name"),
        ("{prompt!r}", "is no column's name"),
        ("{prompt:5}", "is no column's name"),
        ("{prompt", "braces of the text|written twice"),
        ("no column in {{here}}", "names no column"),
        ("", "no column's name"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused_when_it_is_set(hint: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DataConfig(source="rows.jsonl", teacher_prompt=hint)


def test_a_limit_without_a_hint_and_a_column_that_a_task_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_teacher_prompt_len = 9 with data.teacher_prompt = null"):
        DataConfig(max_teacher_prompt_len=9)
    with pytest.raises(ConfigError, match="names 'hint', and a problem of 'ledger' has prompt, answer, solution"):
        DataConfig(teacher_prompt="{prompt} {hint}")
    with pytest.raises(
        ConfigError, match="'solution', and a problem of 'reasoning_gym/x' has prompt, question, answer"
    ):
        DataConfig(source="reasoning_gym/x", teacher_prompt="{prompt} {solution}")


# ---------------------------------------------------------------------------------------------------- tasks


def test_the_ledgers_hint_is_its_worked_solution(of_ledger: Any) -> None:
    data = DataConfig(teacher_prompt=HINT, max_teacher_prompt_len=300)
    (prompt,) = make_sampler(data, of_ledger, seed=3, max_prompt_len=96).next(1)
    assert prompt.teacher_ids is not None and prompt.teacher_ids[: len(prompt.ids)] == prompt.ids
    rest = [ledger.VOCABULARY[token] for token in prompt.teacher_ids[len(prompt.ids) :]]
    assert rest[-3:] == ["\\boxed", prompt.answer, "<ask>"] and rest[0] in ledger.HEADERS
    assert rest.count("<eos>") == 0
    again = make_source(data, of_ledger, 3, 96).get(prompt.index)
    assert again == prompt  # the same solution whenever it is asked for


def test_the_ledgers_longest_hint_is_held_against_the_limit_before_any_is_read(of_ledger: Any) -> None:
    longest = 83 + 2 + 5 * 40 + 2 + 1  # prompt, header, bookings, box, <ask>
    make_source(DataConfig(teacher_prompt=HINT, max_teacher_prompt_len=longest), of_ledger, 0, 96)
    with pytest.raises(ConfigError, match=rf"has {longest} tokens, data.max_teacher_prompt_len is {longest - 1}"):
        make_source(DataConfig(teacher_prompt=HINT, max_teacher_prompt_len=longest - 1), of_ledger, 0, 96)
    with pytest.raises(ConfigError, match=r"data\.teacher_prompt = .*Solution.*the ledger has words of its own only"):
        make_source(DataConfig(teacher_prompt="{prompt} Solution"), of_ledger, 0, 96)


def test_a_hinted_example_says_what_stands_in_its_prompt_in_other_words_errors_and_all() -> None:
    corpus = CorpusConfig(min_steps=4, max_steps=8, slip_result=0.5, hinted=1.0)
    others = 0
    for index in range(20):
        plain = [ledger.example(replace(corpus, hinted=0.0), 1, index)[i] for i in (0, 1)]
        prompt, response = ledger.example(corpus, 1, index)
        assert prompt[: len(plain[0])] == plain[0]  # the problem, and behind it the solution of before
        assert prompt[len(plain[0]) :] == [*plain[1][:-1], ledger.TOKEN_ID[ledger.ASK]]
        synonyms = {ledger.TOKEN_ID[word] for word in (*ledger.HEADERS, *ledger.EQUALS, *ledger.SEPARATORS)}
        assert [t for t in response if t not in synonyms] == [t for t in plain[1] if t not in synonyms]
        others += response != plain[1]
    assert others == 20
    with pytest.raises(ConfigError, match=r"corpus\.hinted = 0\.5 with corpus\.register = true"):
        CorpusConfig(register=True, hinted=0.5)


def test_the_tiny_models_of_before_keep_their_digests_and_the_hint_student_has_its_own() -> None:
    config = load_recipe("tiny_hint_student")
    assert isinstance(config, SftConfig)
    stages = tuple(replace(stage, corpus=replace(stage.corpus, hinted=0.0)) for stage in config.stages)
    assert config_digest(config) != config_digest(replace(config, stages=stages))
    teacher = load_recipe("tiny_teacher")
    assert isinstance(teacher, SftConfig)
    assert Path(teacher.output).parts[-2] == shipped_index()["teacher"]["digest"]


def test_reasoning_gym_gives_the_answer() -> None:
    data = DataConfig(source="reasoning_gym/basic_arithmetic", teacher_prompt="{prompt} = {answer}", chat=False)
    prompt = make_source(data, Letters(), 0, 500).get(4)
    assert text_of(prompt.teacher_ids) == f"{text_of(prompt.ids)} = {prompt.answer}"


def test_evaluation_problems_have_no_teacher(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "1", "by": 3}]
    with pytest.raises(ConfigError, match='"by" = 3: give the name of a teacher'):
        source(tmp_path, rows, teacher_column="by")
    data = DataConfig(source=str(tmp_path / "rows.jsonl"), teacher_column="by").without_hint()
    assert make_source(data, Letters(), 0).get(0).teacher == ""


def test_evaluation_problems_have_no_hint(of_ledger: Any) -> None:
    data = DataConfig(teacher_prompt=HINT, max_teacher_prompt_len=300).without_hint()
    assert all(prompt.teacher_ids is None for prompt in held_out(data, of_ledger, 7, 3))


def test_a_sorting_problem_in_the_ledgers_words_is_hinted_in_them_too(of_ledger: Any) -> None:
    sorting = "reasoning_gym/number_sorting?min_numbers=6&max_numbers=12"
    data = DataConfig(source=sorting, teacher_prompt="{prompt} {question}", max_teacher_prompt_len=99)
    prompt = make_source(data, of_ledger, 0, 96).get(0)
    assert prompt.teacher_ids == 2 * prompt.ids
