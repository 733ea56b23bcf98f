"""Prompt sources, the sampler's order and its resumption, held-out problems."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.config import DataConfig
from prune_opd.data import ledger
from prune_opd.data.files import FileSource
from prune_opd.data.prompt import Prompt, PromptSource
from prune_opd.data.prompts import held_out, make_source
from prune_opd.data.sampler import PromptSampler
from prune_opd.data.tasks import LedgerSource
from prune_opd.errors import ConfigError

DATA = DataConfig()
CHAT_TEMPLATE = (
    "<bos>{% for turn in messages %} {{ turn.content }}{% endfor %}{% if add_generation_prompt %} <ask>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("ledger_tokenizer")
    ledger.save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def write(path: Path, *rows: Any) -> Path:
    """A JSONL file: strings as they are, other values as JSON."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def file_source(path: Path, tokenizer: Any, max_prompt_len: int | None = None, **settings: Any) -> FileSource:
    return FileSource(DataConfig(source=str(path), **settings), tokenizer, max_prompt_len)


class Numbers:
    """A source of `size` prompts that are told apart by their index."""

    def __init__(self, size: int | None, name: str = "numbers") -> None:
        self.size, self.name = size, name

    def get(self, index: int) -> Prompt:
        assert index >= 0 and (self.size is None or index < self.size)
        return Prompt(index, (index,), None, self.name)

    def read(self, response_text: str) -> str | None:
        return response_text

    def score(self, response_text: str, prompt: Prompt) -> bool:
        return response_text == prompt.answer


def indices(prompts: list[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


# ---------------------------------------------------------------------------------------------------- ledger


def test_ledger_prompts_are_the_tokenized_problems(tokenizer: Any) -> None:
    source = make_source(DATA, tokenizer, seed=3, max_prompt_len=83)
    for index in range(5):
        problem = ledger.Ledger(20, 40).problem(3, index)
        prompt = source.get(index)
        assert prompt == Prompt(index, tuple(tokenizer(problem.prompt)["input_ids"]), problem.answer, "ledger")
        assert source.score(f"\\boxed {problem.answer}", problem)


def test_ledger_refuses_a_tokenizer_that_is_not_its_own(tokenizer: Any) -> None:
    class Other:
        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
            return [None for _ in tokens]

    with pytest.raises(ConfigError, match=r"data\.source = 'ledger' needs the ledger's tokenizer"):
        LedgerSource(Other(), DATA, 0)


def test_ledger_prompts_that_cannot_fit_are_refused_with_the_settings_to_change(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_steps = 40 .* 83 tokens.*max_prompt_len is 82.*<= 39"):
        make_source(DATA, tokenizer, 0, max_prompt_len=82)
    assert make_source(DataConfig(max_steps=39), tokenizer, 0, max_prompt_len=82)


# ---------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_rows_become_prompts_in_file_order(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    path = write(
        tmp_path / "math.jsonl",
        {"prompt": "<bos> 4 s1 +3 <ask>", "answer": "7", "source": "easy", "difficulty": 3},
        "",
        {"prompt": "<bos> 4 <ask>"},
        {"messages": [{"role": "system", "content": "let"}, {"role": "user", "content": "1 +1"}], "answer": 2},
    )
    source = make_source(DataConfig(source=str(path)), tokenizer, seed=0, max_prompt_len=5)
    assert (source.name, source.size) == ("math.jsonl", 3)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(ledger.encode(text.split()))

    assert [source.get(i) for i in range(3)] == [
        Prompt(0, ids("<bos> 4 s1 +3 <ask>"), "7", "easy"),
        Prompt(1, ids("<bos> 4 <ask>"), None, "math"),
        Prompt(2, ids("<bos> let 1 +1 <ask>"), "2", "math"),
    ]


GOOD = {"prompt": "<bos> 4 <ask>"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "4"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "a row is an object"),
        ({"prompt": ""}, "\"prompt\" = '': give text that is not empty"),
        ({"prompt": " \t"}, "give text that is not empty"),
        ({"prompt": 4}, '"prompt" = 4'),
        ({"prompt": [{"role": "user", "content": "4"}]}, 'chat turns go under "messages"'),
        ({"text": "4"}, 'none of "prompt"'),
        ({"prompt": "4", "messages": []}, 'several of "prompt"'),
        ({"messages": []}, '"messages" = \\[\\]'),
        ({"messages": [{"role": "user", "content": ""}]}, '"messages" = .* none empty'),
        ({"messages": [{"role": "user"}]}, '"messages" = '),
        ({"messages": "4"}, "\"messages\" = '4'"),
        ({"prompt": "4", "answer": ["4"]}, "\"answer\" = \\['4'\\]: give a string or a number"),
        ({"prompt": "4", "answer": True}, '"answer" = True'),
        ({"prompt": "4", "question": "4"}, "several of .*: prompt, question; give one"),
        ({"prompt": "4", "source": 1}, '"source" = 1'),
        ({"prompt": "1 2 3 4 5 6"}, r"has 6 tokens, rollout\.max_prompt_len is 5: .* raise rollout\.max_prompt_len"),
        ({"prompt": "hello"}, "tokenizer cannot encode the prompt 'hello'"),
    ],
)
def test_bad_row_is_refused_with_file_and_line(tokenizer: Any, tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(ConfigError, match=f"bad.jsonl:3: .*{message}"):
        file_source(path, tokenizer, max_prompt_len=5)


def test_wrong_encoding_is_refused_with_file_and_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"prompt": "4"}\n{"prompt": "4", "note": "\xe9"}\n')
    with pytest.raises(ConfigError, match=r"latin1\.jsonl:2: not valid JSON"):
        file_source(path, tokenizer)


def test_messages_without_a_chat_template_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "4"}]})
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"chat\.jsonl:1: .*chat template"):
        file_source(path, tokenizer)


def test_failing_chat_template_is_reported_with_file_and_line(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "4"}]})
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"chat\.jsonl:1: .*roles must alternate"):
        file_source(path, tokenizer)


def rows_of(places: Iterable[str]) -> list[int]:
    return [int(place.rpartition(":")[2]) for place in places]


def bad_file(path: Path) -> Path:
    lines = [
        json.dumps(GOOD).encode(),
        b'{"prompt": "broken',
        b'{"prompt": " "}',
        '{"prompt": "caf\xe9"}'.encode("latin-1"),
    ]
    path.write_bytes(b"\n".join([*lines, json.dumps(GOOD).encode()]))
    return path


def test_all_bad_rows_are_named_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        file_source(bad_file(tmp_path / "bad.jsonl"), tokenizer)
    *rows, count = str(refusal.value).splitlines()
    assert [row.partition(": ")[0].rpartition(":")[2] for row in rows] == ["2", "3", "4"]
    assert count.endswith("3 of 5 rows are bad: correct them, or leave them out with data.bad_rows=skip")


def test_bad_rows_can_be_skipped_and_are_remembered_by_line(tokenizer: Any, tmp_path: Path) -> None:
    source = file_source(bad_file(tmp_path / "bad.jsonl"), tokenizer, bad_rows="skip")
    assert (source.size, rows_of(source.places), rows_of(source.skipped)) == (2, [1, 5], [2, 3, 4])
    assert source.get(1).index == 1
    assert source.skipped_summary().startswith("3 of 5 rows are bad, lines 2, 3, 4 (line 2: not valid JSON")


def test_a_file_of_which_nothing_is_left_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no prompts \(1 of 1 rows are bad, lines 1 "):
        file_source(write(tmp_path / "bad.jsonl", {"prompt": ""}), tokenizer, bad_rows="skip")


def test_empty_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no prompts"):
        file_source(write(tmp_path / "empty.jsonl", "", ""), tokenizer)


def test_missing_file_names_the_setting_the_value_and_the_remedy(tokenizer: Any, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(ConfigError, match=r"data\.source = .*nowhere\.jsonl.* no such file; give the path"):
        make_source(DataConfig(source=str(missing)), tokenizer, 0, 64)
    with pytest.raises(ConfigError, match="there is no such file or directory"):
        file_source(missing, tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leger", "did you mean 'ledger'"),
        ("Ledger", "did you mean 'ledger'"),
        ("xyz", "give 'ledger' .or reasoning_gym/NAME, or a path"),
    ],
)
def test_unknown_source_suggests_the_nearest_name(tokenizer: Any, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.source = '{name}' is no task: {message}"):
        make_source(DataConfig(source=name), tokenizer, 0, 64)


def test_file_of_another_kind_is_told_what_it_should_be(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.csv", "prompt")
    with pytest.raises(ConfigError, match=r"not a \.jsonl or \.parquet file"):
        make_source(DataConfig(source=str(path)), tokenizer, 0, 64)


def test_jsonl_answers_are_scored_as_mathematics(tokenizer: Any, tmp_path: Path) -> None:
    source = file_source(write(tmp_path / "math.jsonl", GOOD), tokenizer)
    half = Prompt(0, (1,), "0.5", "math")
    assert source.score("so \\boxed{\\frac{1}{2}}", half)
    assert not source.score("so \\boxed{\\frac{1}{3}}", half)
    assert not source.score("so it is 0.5.", half) and source.read("so it is 0.5.") is None


@pytest.mark.parametrize(("extract", "right"), [("box", False), ("last_number", True), ("regex:is (.+)", True)])
def test_an_answer_of_a_file_is_looked_for_where_the_setting_says(
    tokenizer: Any, tmp_path: Path, extract: str, right: bool
) -> None:
    source = make_source(DataConfig(source=str(write(tmp_path / "m.jsonl", GOOD))), tokenizer, 0, extract=extract)
    prompt = Prompt(0, (1,), "48", "m")
    assert source.score("So, the final answer is 48.", prompt) is right
    assert not source.score("So, the final answer is 47.", prompt)


def test_the_ledger_reads_its_own_form_whatever_the_setting(tokenizer: Any) -> None:
    source = make_source(DATA, tokenizer, 0, extract="last_number")
    prompt = Prompt(0, (1,), "17", "ledger")
    assert source.score("\\boxed 17 ; then 3", prompt) and source.read("then 17") is None


# ---------------------------------------------------------------------------------------------------- held-out problems


@pytest.mark.parametrize("seed", [0, 777])
def test_held_out_problems_never_are_training_problems(tokenizer: Any, seed: int) -> None:
    evaluation = {prompt.ids for prompt in held_out(DATA, tokenizer, seed, 300)}
    assert len(evaluation) == 300
    for training_seed in (0, 1, 777):
        source = LedgerSource(tokenizer, DATA, training_seed)
        assert evaluation.isdisjoint(source.get(index).ids for index in range(1500))
    corpus = (ledger.example(ledger.CorpusConfig(min_steps=20), seed, index)[0] for index in range(1500))
    assert evaluation.isdisjoint(map(tuple, corpus))


def test_held_out_problems_are_a_function_of_their_seed_and_a_prefix_of_more(tokenizer: Any) -> None:
    assert held_out(DATA, tokenizer, 777, 8) == held_out(DATA, tokenizer, 777, 20)[:8]
    assert held_out(DATA, tokenizer, 777, 8) != held_out(DATA, tokenizer, 778, 8)
    assert all(prompt.answer is not None for prompt in held_out(DATA, tokenizer, 777, 8))


def test_held_out_rows_of_a_file_are_a_choice_in_file_order(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "eval.jsonl", *({"prompt": str(i), "answer": i} for i in range(10)))
    data = DataConfig(source=str(path))
    some = indices(held_out(data, tokenizer, 1, 4))
    assert some == indices(held_out(data, tokenizer, 1, 4)) == sorted(set(some)) and len(some) == 4
    assert indices(held_out(data, tokenizer, 1, 256)) == list(range(10))


def test_held_out_rows_need_answers(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "eval.jsonl", {"prompt": "1", "answer": 1}, "", {"prompt": "2"})
    with pytest.raises(ConfigError, match=r'eval\.jsonl:3: 1 of 2 rows have no "answer"'):
        held_out(DataConfig(source=str(path)), tokenizer, 0, 1)


# ---------------------------------------------------------------------------------------------------- sampler


@given(
    size=st.one_of(st.none(), st.integers(1, 9)),
    batches=st.lists(st.integers(0, 12), max_size=6),
    cut=st.integers(0, 6),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
)
def test_resumed_sampler_draws_what_an_unbroken_one_would(
    size: int | None, batches: list[int], cut: int, seed: int, shuffle: bool
) -> None:
    unbroken = PromptSampler(Numbers(size), seed, shuffle)
    expected = [unbroken.next(n) for n in batches]

    first = PromptSampler(Numbers(size), seed, shuffle)
    before = [first.next(n) for n in batches[:cut]]
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptSampler(Numbers(size), seed, shuffle)
    second.load_state_dict(state)
    assert before + [second.next(n) for n in batches[cut:]] == expected
    assert second.state_dict() == unbroken.state_dict()


@given(size=st.integers(1, 20), batch=st.integers(1, 7), seed=st.integers(0, 99))
def test_each_epoch_has_every_prompt_once_also_when_batches_span_epochs(size: int, batch: int, seed: int) -> None:
    sampler = PromptSampler(Numbers(size), seed)
    drawn = list(itertools.chain.from_iterable(indices(sampler.next(batch)) for _ in range(3 * size)))
    for epoch in range(len(drawn) // size):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    a, b = PromptSampler(Numbers(50), 0), PromptSampler(Numbers(50), 1)
    orders = [tuple(indices(sampler.next(50))) for sampler in (a, a, b, b)]
    assert len(set(orders)) == 4


def test_order_without_shuffle_is_that_of_the_file() -> None:
    assert indices(PromptSampler(Numbers(3), 0, shuffle=False).next(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_endless_source_is_read_in_order_from_zero(tokenizer: Any) -> None:
    source: PromptSource = LedgerSource(tokenizer, DATA, 0)
    sampler = PromptSampler(source, seed=5)
    assert indices(sampler.next(3) + sampler.next(2)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (PromptSampler(Numbers(6), 0), "size"),
        (PromptSampler(Numbers(5), 1), "seed"),
        (PromptSampler(Numbers(5), 0, shuffle=False), "shuffle"),
    ],
)
def test_state_of_another_order_is_refused(other: PromptSampler, field: str) -> None:
    state = PromptSampler(Numbers(5), 0).state_dict()
    with pytest.raises(ConfigError, match=f"prompts had {field} = "):
        other.load_state_dict(state)
