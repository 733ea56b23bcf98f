"""Tasks of reasoning-gym as sources, mixtures of sources, `prune-opd data`."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym.utils
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prune_opd.config import DataConfig
from prune_opd.data import ledger
from prune_opd.data.inspect import DAPO_AFTER, DAPO_BEFORE, convert, inspect, length_table
from prune_opd.data.prompts import held_out, make_sampler, make_source
from prune_opd.data.sampler import MixtureSampler, PromptSampler
from prune_opd.data.tasks import ReasoningGymSource
from prune_opd.data.tokenizer import load_tokenizer
from prune_opd.errors import ConfigError, UserError
from prune_opd.eval.evaluate import Sampling, make_evaluator
from tests.data.test_prompt_files import write_jsonl, write_parquet
from tests.data.test_prompts import Numbers

SUM = "reasoning_gym/chain_sum?min_terms=2&max_terms=2"

# ---------------------------------------------------------------------------------------------------- reasoning-gym


def test_a_gym_task_is_endless_repeatable_and_scored_by_its_own_scorer(byte_tokenizer: Any) -> None:
    source, again = (make_source(DataConfig(source=SUM), byte_tokenizer, 3) for _ in range(2))
    assert source.size is None and source.name == SUM
    prompts = [source.get(index) for index in range(20)]
    assert prompts == [again.get(index) for index in range(20)] and len({prompt.ids for prompt in prompts}) == 20
    for prompt in prompts:
        assert source.score(f"I think <answer>{prompt.answer}</answer>", prompt)
        assert source.score(f"1, no: \\boxed{{{prompt.answer}}}", prompt)
        assert not source.score(f"<answer>{prompt.answer}</answer> no, <answer>x</answer>", prompt)
        assert not source.score(f"it is {prompt.answer}", prompt), "an answer has its marks"


@pytest.mark.parametrize(
    "text", ["<answer> 5 </answer>", "<answer>1</answer> no, <answer>\n2\n</answer>", "<answer></answer>", "<answer>"]
)
def test_an_answer_in_tags_is_what_reasoning_gym_itself_takes_out(byte_tokenizer: Any, text: str) -> None:
    source = make_source(DataConfig(source=SUM), byte_tokenizer, 3, extract="choice")
    assert source.read(text) == reasoning_gym.utils.extract_answer(text)


def test_a_gym_answer_without_tags_is_looked_for_where_the_setting_says(byte_tokenizer: Any) -> None:
    source = make_source(DataConfig(source=SUM), byte_tokenizer, 3, extract="last_number")
    prompt = source.get(0)
    assert source.score(f"it is {prompt.answer}.", prompt) and not source.score("it is 0.", prompt)
    assert not source.score(f"<answer>0</answer> it is {prompt.answer}.", prompt)


def test_training_and_held_out_problems_of_a_gym_task_differ(byte_tokenizer: Any) -> None:
    data = DataConfig(source="reasoning_gym/countdown")
    source = make_source(data, byte_tokenizer, 777)
    held = {prompt.ids for prompt in held_out(data, byte_tokenizer, 777, 20)}
    assert len(held) == 20 and not held & {source.get(index).ids for index in range(20)}


def test_too_long_gym_problems_are_passed_over(byte_tokenizer: Any) -> None:
    data = DataConfig(source="reasoning_gym/chain_sum")
    lengths = [len(make_source(data, byte_tokenizer, 0).get(index).ids) for index in range(30)]
    limit = sorted(lengths)[15]
    source = make_source(data, byte_tokenizer, 0, max_prompt_len=limit)
    prompts = [source.get(index) for index in range(30)]
    assert all(len(prompt.ids) <= limit for prompt in prompts)
    assert all(source.score(f"\\boxed{{{prompt.answer}}}", prompt) for prompt in prompts)
    with pytest.raises(ConfigError, match="raise it, or set an easier task"):
        make_source(data, byte_tokenizer, 0, max_prompt_len=3).get(0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym/countdwn", "did you mean 'reasoning_gym/countdown'"),
        ("reasoning_gym/countdown?numbers=4", "countdown does not take that"),
        ("reasoning_gym/countdown?min_numbers", "write settings as TASK"),
        ("reasoning_gym/countdown?min_numbers=0", "does not take that"),
        ("reasoning_gym/countdown?min_numbers=[", "quote the value"),
        ("reasoning_gym/countdown?min_numbers=0x_", "not a value: .*; quote the value"),
    ],
)
def test_a_gym_task_that_does_not_exist_is_refused(source: str, message: str, byte_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        make_source(DataConfig(source=source), byte_tokenizer, 0)


# ---------------------------------------------------------------------------------------------------- mixtures


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=6),
)
def test_every_prefix_of_a_mixture_is_within_a_few_prompts_of_its_shares(
    weights: list[float], batches: list[int]
) -> None:
    samplers = [PromptSampler(Numbers(None, name=str(i)), 0) for i in range(len(weights))]
    mixture = MixtureSampler(samplers, weights)
    drawn: Counter[str] = Counter()
    for batch in batches:
        drawn.update(prompt.source for prompt in mixture.next(batch))
        for i, weight in enumerate(weights):
            assert abs(drawn[str(i)] - drawn.total() * weight / sum(weights)) < len(weights)


def test_a_resumed_mixture_goes_on_where_it_was() -> None:
    def mixture() -> MixtureSampler:
        return MixtureSampler([PromptSampler(Numbers(5, name=name), 1) for name in "ab"], [3, 1])

    unbroken, first, second = mixture(), mixture(), mixture()
    expected = unbroken.next(7) + unbroken.next(9)
    before = first.next(7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + second.next(9) == expected
    other = MixtureSampler([PromptSampler(Numbers(5, name=name), 1) for name in "ab"], [1, 1])
    with pytest.raises(ConfigError, match=r"restore data.mixture and data.weights"):
        other.load_state_dict(first.state_dict())


def test_a_mixture_of_a_file_and_a_task(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    data = DataConfig(mixture=(str(path), SUM), weights=(0.25, 0.75))
    drawn = make_sampler(data, byte_tokenizer, 0).next(8)
    assert Counter(prompt.source for prompt in drawn) == {"a": 2, SUM: 6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": ("a", "b"), "weights": (1.0,)}, "data.weights has 1 numbers and data.mixture 2 sources"),
        ({"mixture": ("a",), "weights": (0.0,)}, "every weight is above 0"),
    ],
)
def test_weights_that_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


# ---------------------------------------------------------------------------------------------------- prune-opd data


def test_inspect_shows_prompts_lengths_and_bad_rows(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "why?", "answer": "so"}, {"prompt": "longer"}, {"x": 1}])
    output = io.StringIO()
    console = Console(file=output, width=100)
    inspect(DataConfig(source=str(path), bad_rows="skip"), byte_tokenizer, 1, None, console)
    text = " ".join(output.getvalue().split())  # a long path wraps
    assert "<user>why?</><assistant>" in text and "answer 'so'" in text and "longer" not in text
    assert "2 prompts" in text and "1 of them have no answer" in text and "1 of 3 rows are bad, lines 3" in text


def test_inspect_shows_what_the_teacher_reads(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "why?", "reason": "so"}])
    output = io.StringIO()
    data = DataConfig(source=str(path), teacher_prompt="{question} For: {reason}")
    inspect(data, byte_tokenizer, 1, None, Console(file=output, width=100))
    text = output.getvalue()
    assert "the teacher reads" in text and "<user>why? For: so</><assistant>" in text


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_the_histogram_counts_every_prompt_once(lengths: list[int]) -> None:
    table = length_table(lengths)
    counts = [int(cell) for cell in table.columns[1].cells]
    assert sum(counts) == len(lengths) and len(counts) <= 13
    assert list(table.columns[2].cells)[-1] == "100.0%"


def dapo(problem: str, answer: str) -> dict[str, Any]:
    """A row with the columns of DAPO-Math-17k as published."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO_BEFORE + problem + DAPO_AFTER}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


def test_dapo_rows_become_problems_each_of_them_once(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "dapo.parquet", [dapo("1 + 1?", "2"), dapo("2 + 2?", "4"), dapo("1 + 1?", "2")])
    out = tmp_path / "out" / "prompts.jsonl"
    assert convert("dapo-math-17k", path, out) == 2
    suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    source: Any = make_source(DataConfig(source=str(out), suffix=suffix), byte_tokenizer, 0)
    assert byte_tokenizer.decode(list(source.get(0).ids)) == f"<user>1 + 1?{suffix}</><assistant>"
    assert [(prompt.answer, prompt.source) for prompt in source.prompts] == [("2", "math_dapo"), ("4", "math_dapo")]
    with pytest.raises(UserError, match="is there already"):
        convert("dapo-math-17k", path, out)


def test_a_file_of_another_layout_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "other.parquet", [{"question": "1 + 1?"}])
    with pytest.raises(ConfigError, match=r"other.parquet:1: the row lacks a column of that layout \(there is no"):
        convert("dapo-math-17k", path, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="LAYOUT = 'dapo' is not known"):
        convert("dapo", path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_sorting_is_told_in_the_ledgers_words_and_scored_by_its_own_task(tmp_path: Path) -> None:
    ledger.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    data = DataConfig(source="reasoning_gym/number_sorting?min_numbers=3&max_numbers=6")
    source = make_source(data, tokenizer, 0)
    prompt = source.get(3)
    words = tokenizer.decode(prompt.ids).split()
    numbers, ascending = [int(word) for word in words[2:-1]], words[1] == "+1"
    right = sorted(numbers, reverse=not ascending)
    assert words[0] == "<bos>" and words[-1] == "<ask>" and 3 <= len(numbers) <= 6
    assert source.score("begin " + " ; ".join(map(str, right)), prompt)
    assert not source.score("begin " + " ; ".join(map(str, right[::-1])), prompt)
    assert not source.score("begin " + " ; ".join(map(str, right[1:])), prompt)
    assert not source.score("", prompt)
    assert isinstance(source, ReasoningGymSource)
    worked = source.worked(3)
    assert worked is not None and source.score(tokenizer.decode(worked), prompt)


def test_an_evaluator_scores_a_gym_answer_against_the_problem_that_it_asked(byte_tokenizer: Any) -> None:
    """A task's own scorer needs the problem, and the held-out ones come from a stream of their own."""
    data, sampling = DataConfig(source=SUM), Sampling(1, 8, 1.0, 1.0, 777)
    evaluator = make_evaluator(byte_tokenizer, data, 8, None, sampling, "box")
    for problem in evaluator.problems:
        assert evaluator.source.score(rf"\boxed{{{problem.answer}}}", problem)
        assert not evaluator.source.score(r"\boxed{123456}", problem)
