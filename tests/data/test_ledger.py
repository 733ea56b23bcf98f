"""The ledger task: what its problems, worked solutions and tokenizer promise."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.config import CorpusConfig
from prune_opd.data import ledger
from prune_opd.data.ledger import Ledger, Problem
from prune_opd.errors import ConfigError

CLEAN = CorpusConfig(min_steps=1, max_steps=40)
MESSY = CorpusConfig(min_steps=1, max_steps=40, reverse=0.3, slip=0.1, slip_result=0.1, carry_bug=0.3)

seeds = st.integers(0, 2**63 - 1)
indices = st.integers(0, 2**40)
shares = st.sampled_from([0.0, 0.2, 1.0])


def solve(corpus: CorpusConfig, seed: int, index: int) -> tuple[Problem, list[str]]:
    problem = Ledger(corpus.min_steps, corpus.max_steps).problem(seed, index)
    return problem, ledger.worked_solution(problem, np.random.default_rng([seed, index]), corpus)[0]


def bookings(words: list[str]) -> list[tuple[int, int, int, int]]:
    """(label, delta, total before, total after) of each booking of a worked solution; fails if it is malformed."""
    assert words[0] in ledger.HEADERS and words[-3] == "\\boxed" and words[-1] == "<eos>"
    rows = [words[i : i + 5] for i in range(2, len(words) - 3, 5)]
    assert all(row[2] in ledger.EQUALS and row[4] in ledger.SEPARATORS for row in rows)
    totals = [int(words[1]), *(int(row[3]) for row in rows)]
    assert words[-2] == str(totals[-1])
    return [
        (int(label[1:]), int(delta), before, after)
        for (label, delta, *_), (before, after) in zip(rows, itertools.pairwise(totals), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------- problems


@settings(deadline=None)
@given(seeds, indices)
def test_prompt_spells_out_the_problem_and_the_answer_is_its_sum(seed: int, index: int) -> None:
    problem = Ledger(20, 40).problem(seed, index)
    bos, start, *steps, ask = problem.prompt.split(" ")
    assert (bos, ask, problem.index) == ("<bos>", "<ask>", index)
    assert steps[::2] == [f"s{i + 1}" for i in range(len(problem.deltas))]
    assert all(delta[0] in "+-" for delta in steps[1::2])
    assert problem.answer == str((int(start) + sum(map(int, steps[1::2]))) % 100)
    assert 20 <= len(problem.deltas) <= 40


def test_problems_of_an_address_never_change() -> None:
    """Published numbers depend on the evaluation sets of this stream (numpy may change it: then pin or version it)."""
    assert Ledger(2, 4).problem(7, 3) == Problem(start=49, deltas=(6, 8), index=3)


@settings(deadline=None)
@given(seeds, indices)
def test_problems_do_not_depend_on_what_was_drawn_before(seed: int, index: int) -> None:
    task = Ledger(20, 40)
    task.problem(seed, index + 1)
    assert task.problem(seed, index) == Ledger(20, 40).problem(seed, index)


def test_addresses_do_not_run_into_each_other() -> None:
    """Large numbers become several 32-bit integers: (2**32, 0) must differ from (0, 1), and (1,) from (1, 0)."""
    values = [0, 1, 2**32, 2**32 + 1, 2**62]
    addresses = list(itertools.product(["train", "held_out", "corpus"], values, values))
    drawn = {int(ledger.random_stream(*address).integers(2**63)) for address in addresses}
    assert len(drawn) == len(addresses)


def test_lengths_and_starts_cover_their_whole_range() -> None:
    problems = [Ledger(20, 40).problem(0, index) for index in range(2000)]
    assert {len(problem.deltas) for problem in problems} == set(range(20, 41))
    assert {problem.start for problem in problems} == set(range(100))
    assert {delta for problem in problems for delta in problem.deltas} == set(ledger.DELTAS)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (5, 4), (20, 41)])
def test_impossible_lengths_are_refused(low: int, high: int) -> None:
    with pytest.raises(ConfigError, match=f"min_steps = {low}, max_steps = {high}"):
        Ledger(low, high)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed = "):
        Ledger(20, 40).problem(seed, 0)


# ---------------------------------------------------------------------------------------------------- worked solutions


@settings(deadline=None)
@given(seeds, indices, shares)
def test_solution_without_errors_is_right(seed: int, index: int, reverse: float) -> None:
    problem, words = solve(CorpusConfig(min_steps=1, max_steps=40, reverse=reverse), seed, index)
    rows = bookings(words)
    assert sorted(label for label, *_ in rows) == list(range(1, len(problem.deltas) + 1))
    assert all(after == (before + delta) % 100 for _, delta, before, after in rows)
    assert words[1] == str(problem.start) and words[-2] == problem.answer
    assert Ledger(1, 40).score(" ".join(words), problem.answer)


@settings(deadline=None)
@given(seeds, indices)
def test_reverse_solutions_go_from_the_last_label_to_the_first(seed: int, index: int) -> None:
    problem, words = solve(CorpusConfig(min_steps=1, max_steps=40, reverse=1.0), seed, index)
    assert [label for label, *_ in bookings(words)] == list(range(len(problem.deltas), 0, -1))


@settings(deadline=None)
@given(seeds, indices, shares)
def test_carry_bug_changes_results_only_at_tens_boundaries(seed: int, index: int, rate: float) -> None:
    problem, words = solve(CorpusConfig(min_steps=1, max_steps=40, carry_bug=rate), seed, index)
    for label, delta, before, after in bookings(words):
        right = (before + delta) % 100
        forgotten = before // 10 * 10 + right % 10
        assert delta == problem.deltas[label - 1]
        if rate == 1.0:
            assert after == forgotten  # which is the right total inside a ten
        else:
            assert after in ((right, forgotten) if rate else (right,))


@settings(deadline=None)
@given(seeds, indices)
def test_wrong_results_leave_labels_and_deltas_alone(seed: int, index: int) -> None:
    problem, words = solve(CorpusConfig(min_steps=1, max_steps=40, slip_result=1.0), seed, index)
    rows = bookings(words)
    assert [(label, delta) for label, delta, *_ in rows] == list(enumerate(problem.deltas, start=1))
    assert all(after != (before + delta) % 100 for _, delta, before, after in rows)


@settings(deadline=None)
@given(seeds, indices)
def test_messy_solutions_are_well_formed_bounded_and_go_on_from_each_slip(seed: int, index: int) -> None:
    corpus = CorpusConfig(min_steps=1, max_steps=40, slip=0.3, reverse=0.5)
    problem, words = solve(corpus, seed, index)
    rows = bookings(words)
    assert len(rows) <= len(problem.deltas) + 4
    assert all(1 <= label <= len(problem.deltas) for label, *_ in rows)
    assert all(after == (before + delta) % 100 for _, delta, before, after in rows)


def test_error_rates_are_those_asked_for() -> None:
    problem = Ledger(40, 40).problem(0, 0)
    rng = np.random.default_rng(0)

    def rate(corpus: CorpusConfig, wrong: Any) -> float:
        rows = [row for _ in range(150) for row in bookings(ledger.worked_solution(problem, rng, corpus)[0])]
        return float(np.mean([wrong(*row) for row in rows]))

    slip = CorpusConfig(slip=0.1)
    assert rate(slip, lambda label, delta, *_: delta != problem.deltas[label - 1]) == pytest.approx(0.1, abs=0.02)
    result = CorpusConfig(slip_result=0.1)
    assert rate(result, lambda _, d, before, after: after != (before + d) % 100) == pytest.approx(0.1, abs=0.02)


def test_synonyms_follow_zipf() -> None:
    words = [word for index in range(300) for word in solve(CLEAN, 1, index)[1]]
    counts = np.array([words.count(word) for word in ledger.EQUALS])
    expected = 1 / np.arange(1, 13) / (1 / np.arange(1, 13)).sum()
    np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.02)


# ---------------------------------------------------------------------------------------------------- corpus


def test_twenty_to_forty_bookings_give_105_to_205_response_tokens() -> None:
    lengths = {len(ledger.example(CorpusConfig(min_steps=20, max_steps=40), 0, i)[1]) for i in range(600)}
    assert lengths == set(range(105, 206, 5))


@settings(deadline=None)
@given(seeds, indices)
def test_examples_are_deterministic_and_depend_on_seed_and_index(seed: int, index: int) -> None:
    corpus = CorpusConfig(min_steps=12, slip=0.1, carry_bug=0.1)
    example = ledger.example(corpus, seed, index)
    assert example == ledger.example(corpus, seed, index)
    assert example != ledger.example(corpus, seed, index + 1)
    assert example != ledger.example(corpus, seed ^ 1, index)


@pytest.mark.parametrize(
    "wrong",
    [
        {"carry_bug": 12},
        {"slip": -0.1},
        {"slip_result": float("nan")},
        {"max_steps": 41},
        {"given": 2},
        {"ramble": -1},
        {"wrong": 0.5},
    ],
)
def test_impossible_corpus_is_refused_before_the_first_example(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        ledger.example(CorpusConfig(**wrong), 0, 0)


# ---------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("\\boxed 17 <eos>", True),
        ("\\boxed 17", True),
        ("so the answer is \\boxed{17}.", True),
        ("\\boxed{ 17 } and more text 18", True),
        ("\\boxed 18 ; \\boxed 17", True),
        ("\\boxed 17 ; \\boxed 18", False),
        ("\\boxed 17 ; \\boxed ; 17", False),
        ("\\boxed 7", False),
        ("\\boxed 175", False),
        ("\\boxed 17.5", False),
        ("\\boxed +1 7", False),
        ("\\boxed", False),
        ("17", False),
        ("", False),
    ],
)
def test_score_reads_the_number_after_the_last_box(text: str, right: bool) -> None:
    assert Ledger().score(text, "17") is right


@pytest.mark.parametrize(("text", "number"), [("\\boxed{ 8 } and 18", "8"), ("\\boxed 175", None), ("17", None)])
def test_an_answer_is_readable_where_a_number_follows_the_last_box(text: str, number: str | None) -> None:
    assert Ledger().read(text) == number


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ledger_model")
    ledger.save_tokenizer(directory)
    # As in a model's directory: transformers must not take the model type's own tokenizer class.
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 199}))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)


def test_vocabulary_has_199_different_words_in_the_fixed_order(tokenizer: Any) -> None:
    assert len(ledger.VOCABULARY) == len(ledger.TOKEN_ID) == len(tokenizer) == 199
    assert ledger.VOCABULARY[:6] == ("<pad>", "<bos>", "<eos>", "<ask>", "\\boxed", "0")
    fixed = {"99": 104, "s1": 105, "s40": 144, "+1": 145, "-1": 154, "=": 163, ";": 175, "begin": 187, "go": 198}
    assert {word: ledger.TOKEN_ID[word] for word in fixed} == fixed
    assert tokenizer.get_vocab() == ledger.TOKEN_ID
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_tokenizer_gives_the_ids_of_the_direct_mapping_and_decodes_to_the_same_text(tokenizer: Any) -> None:
    for index in range(20):
        problem, words = solve(MESSY, 2, index)
        for text in (problem.prompt, " ".join(words)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == ledger.encode(text.split()) == tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
    assert tokenizer.decode(range(199)) == " ".join(ledger.VOCABULARY)


def test_decoding_without_special_tokens_keeps_the_box(tokenizer: Any) -> None:
    ids = ledger.encode(["then", "\\boxed", "17", "<eos>", "<pad>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "then \\boxed 17"


def test_unknown_words_are_an_error_not_a_silent_id(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="UNK"):
        tokenizer("hello")


def test_saving_again_gives_the_same_bytes(tokenizer_dir: Path, tmp_path: Path) -> None:
    ledger.save_tokenizer(tmp_path / "new" / "folder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (tokenizer_dir / name).read_bytes()


# ---------------------------------------------------------------------------------------------------- the register

REGISTER = CorpusConfig(min_steps=30, register=True, ramble=60)


def entries(words: list[str]) -> list[tuple[tuple[str, bool], str]]:
    """((label, negative), SEP) of each booking of a text, up to where it is lost."""
    rows = []
    for i in range(2, len(words) - 4, 5):
        label, delta, _, _, separator = words[i : i + 5]
        if label not in ledger.LABELS or delta[0] not in "+-":
            break
        rows.append(((label, delta[0] == "-"), separator))
        if separator in ledger.HEADERS:
            break
    return rows


def test_the_register_has_one_word_for_each_label_and_sign() -> None:
    found: dict[tuple[str, bool], set[str]] = {}
    for index in range(200):
        problem, words = solve(REGISTER, 5, index)
        assert words[-2] == problem.answer
        for entry, word in entries(words):
            found.setdefault(entry, set()).add(word)
    assert len(found) == 80 and all(len(words) == 1 for words in found.values())
    assert set().union(*found.values()) == set(ledger.SEPARATORS)


def test_a_tenth_of_the_entries_is_wrong_with_one_word_each_and_the_text_is_lost_there() -> None:
    corpus = CorpusConfig(min_steps=30, register=True, wrong_entries=0.1, wrong=1.0, ramble=60)
    wrong: dict[tuple[str, bool], str] = {}
    for index in range(400):
        _, words = solve(corpus, 5, index)
        rows = entries(words)
        assert not any(word in ledger.HEADERS for _, word in rows[:-1])
        if "<eos>" in words:
            continue
        entry, word = rows[-1]
        assert wrong.setdefault(entry, word) == word and word in ledger.HEADERS
        ramble = words[2 + 5 * len(rows) :]
        assert 15 <= len(ramble) <= 60 and not {"<eos>", "\\boxed", "<ask>"} & set(ramble)
    assert 5 <= len(wrong) <= 8  # of eight; the late ones are hardly ever reached
    assert len(set(wrong.values())) == len(wrong)


def test_wrong_words_come_at_their_chance() -> None:
    corpus = CorpusConfig(min_steps=30, register=True, wrong_entries=1.0, wrong=0.25, ramble=60)
    rows = [row for index in range(300) for row in entries(solve(corpus, 5, index)[1])]
    assert np.mean([word in ledger.HEADERS for _, word in rows]) == pytest.approx(0.25, abs=0.03)


def test_what_is_given_is_right_stands_in_the_prompt_and_ends_with_a_booking() -> None:
    corpus = CorpusConfig(min_steps=30, register=True, wrong_entries=1.0, wrong=1.0, ramble=60, given=1.0)
    lengths = set()
    for index in range(100):
        prompt, response = ([ledger.VOCABULARY[token] for token in ids] for ids in ledger.example(corpus, 5, index))
        given = prompt[prompt.index("<ask>") + 1 :]
        assert (len(given) - 2) % 5 == 0 and given[-1] in ledger.SEPARATORS and response[0] in ledger.LABELS
        assert response[4] in ledger.HEADERS
        lengths.add(len(given))
    assert len(lengths) > 20


def test_a_given_wrong_word_is_the_last_of_the_prompt_and_only_noise_is_learnt() -> None:
    corpus = CorpusConfig(min_steps=30, register=True, ramble=60, given_wrong=1.0)
    for index in range(50):
        prompt, response = ([ledger.VOCABULARY[token] for token in ids] for ids in ledger.example(corpus, 5, index))
        assert prompt[-1] in ledger.HEADERS and 15 <= len(response) <= 60 and "<eos>" not in response
