"""Accuracy over problems, and the comparison of mathematical answers in its child process."""

import itertools
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.data import answers
from prune_opd.data.answers import Accuracy, avg_at_k, last_boxed, math_equal, pass_at, score_responses
from prune_opd.data.extract import read_answer
from prune_opd.data.prompt import Prompt

# ---------------------------------------------------------------------------------------------------- accuracy


def test_avg_at_k_of_a_worked_example() -> None:
    accuracy = avg_at_k([[True, True], [True, False], [False, False]])
    assert accuracy == Accuracy(mean=0.5, stderr=0.5 / math.sqrt(3), pass_at_k=2 / 3, n_problems=3, k=2)


@given(st.integers(1, 5).flatmap(lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=2)))
def test_mean_is_that_of_all_samples_and_pass_at_k_is_not_below_it(correct: list[list[bool]]) -> None:
    accuracy = avg_at_k(correct)
    flat = [sample for samples in correct for sample in samples]
    assert accuracy.mean == pytest.approx(sum(flat) / len(flat))
    assert accuracy.pass_at_k >= accuracy.mean - 1e-12
    assert (accuracy.n_problems, accuracy.k) == (len(correct), len(correct[0]))


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_stderr_counts_problems_not_samples(once: list[bool]) -> None:
    """Sampling a deterministic model more often adds no certainty."""
    one, many = avg_at_k([[right] for right in once]), avg_at_k([[right] * 8 for right in once])
    assert one.stderr == many.stderr


def test_stderr_of_a_single_problem_is_unknown() -> None:
    assert math.isnan(avg_at_k([[True, False]]).stderr)


@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=2)))
def test_the_interval_holds_the_mean_inside_zero_and_one(correct: list[list[bool]]) -> None:
    accuracy = avg_at_k(correct)
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.mean <= high <= 1 and high - low > 0


def test_the_interval_is_wilsons_for_one_sample_a_problem() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, the score interval."""
    low, high = avg_at_k([[i < 81] for i in range(263)]).interval
    assert (low, high) == (pytest.approx(0.2553, abs=2e-3), pytest.approx(0.3662, abs=2e-3))


def test_more_samples_narrow_the_interval_only_where_problems_agree() -> None:
    """If all samples of a problem are right or all are wrong, a second sample adds nothing."""
    alike, split = [[True, False] * 8] * 20, [[True] * 16, [False] * 16] * 10
    narrow, wide = (high - low for low, high in (avg_at_k(alike + split[:1]).interval, avg_at_k(split).interval))
    once_low, once_high = avg_at_k([[True], [False]] * 10).interval
    assert narrow < wide == pytest.approx(once_high - once_low)


def test_pass_at_k_is_the_chance_that_a_subset_of_the_samples_has_a_right_one() -> None:
    correct = [[True, False, False, False], [True, True, True, False], [False] * 4]
    for k in range(1, 5):
        subsets = [list(itertools.combinations(row, k)) for row in correct]
        expected = sum(sum(map(any, choices)) / len(choices) for choices in subsets) / 3
        assert pass_at(correct, k) == pytest.approx(expected)
    assert pass_at(correct, 4) == avg_at_k(correct).pass_at_k
    with pytest.raises(ValueError, match="at least 5 samples"):
        pass_at(correct, 5)


@pytest.mark.parametrize("correct", [[], [[]], [[True], [True, False]]])
def test_nothing_to_average_is_refused(correct: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        avg_at_k(correct)


class Echo:
    name = "echo"
    size = None

    def get(self, index: int) -> Prompt:
        return Prompt(index, (index,), str(index), self.name)

    def read(self, response_text: str) -> str | None:
        return response_text

    def score(self, response_text: str, prompt: Prompt) -> bool:
        return response_text == prompt.answer


def test_responses_are_scored_against_their_own_prompt() -> None:
    source = Echo()
    prompts = [source.get(index) for index in range(2)]
    assert score_responses(source, prompts, [["0", "1"], ["1", "1"]]) == [[True, False], [True, True]]


def test_scoring_without_answer_or_with_missing_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 4 of echo has no answer"):
        score_responses(Echo(), [Prompt(4, (), None, "echo")], [["4"]])
    with pytest.raises(ValueError, match="zip"):
        score_responses(Echo(), [Echo().get(0)], [])


# ---------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{17}.", "17"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"$\boxed{\frac{1}{\sqrt{2}}}$ {", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 17 ; then", "17"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{1} but wait, \boxed{", None),
        (r"\boxed", None),
        (r"\boxed  ", None),
        ("17", None),
    ],
)
def test_last_boxed_takes_the_whole_last_box_or_nothing(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


# ---------------------------------------------------------------------------------------------------- mathematics


@pytest.fixture(autouse=True, scope="module")
def _child_ends_with_the_tests() -> Iterator[None]:
    yield
    answers._comparer().close()


def boxes(response_text: str, answer: str) -> bool:
    """Whether the response's last box has the answer."""
    given = read_answer(response_text, "box")
    return given is not None and math_equal(given, answer)


@pytest.mark.parametrize(
    ("boxed", "answer", "right"),
    [
        ("17", "17", True),
        ("18", "17", False),
        ("17.0", "17", True),
        ("1,000", "1000", True),
        (r"\dfrac{1}{2}", r"$\frac12$", True),
        ("0.5", r"\boxed{\frac{1}{2}}", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("2^{10}", "1024", True),
        ("x = 17", "17", True),
        (r"\text{(C)}", "C", True),
        ("5, 3", "3,5", True),
        ("(1, 3)", "(1,2)", False),
        ("Paris", "Paris", True),
        ("London", "Paris", False),
        (r"\frac{", "1", False),
        ("", "1", False),
        ("\n\x00\u2028", "1", False),
    ],
)
def test_boxed_answers_are_compared_as_mathematics(boxed: str, answer: str, right: bool) -> None:
    assert boxes(f"Therefore the answer is $\\boxed{{{boxed}}}$. <eos>", answer) is right


def answer_pairs() -> list[tuple[str, str, bool]]:
    lines = Path(__file__).with_name("answer_pairs.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"(.+?) (==|!=|=\?|!\?) (.+)", line) for line in lines if line and line[:2] != "# "]
    return [(pair[1], pair[3], pair[2][0] == "=") for pair in found if pair]


def test_three_hundred_pairs_of_published_conventions_have_their_verdicts() -> None:
    pairs = answer_pairs()
    assert len(pairs) >= 300
    assert [pair for pair in pairs if math_equal(*pair[:2]) != pair[2]] == []


def test_an_empty_answer_equals_nothing() -> None:
    assert not math_equal("", "") and not math_equal(" ", "$ $") and not math_equal("5", "") and not math_equal("", "5")


def test_number_without_a_box_is_no_answer() -> None:
    assert not boxes("the answer is 17", "17")


def test_only_the_last_box_counts() -> None:
    assert boxes(r"\boxed{18} and then \boxed{17}", "17")
    assert not boxes(r"\boxed{17} and then \boxed{18}", "17")


def test_answer_that_computes_for_ever_is_wrong_and_the_next_one_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "COMPARE_SECONDS", 1)
    comparer = answers._Comparer()
    assert not comparer.equal("9^{9^{9^9}}", "17")
    assert comparer.equal("17.0", "17")
    comparer.close()


def test_child_that_was_killed_between_two_answers_is_replaced() -> None:
    assert math_equal("3.0", "3")
    child = answers._comparer()._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert math_equal("4.0", "4")


def test_scoring_works_in_threads_and_leaves_the_alarm_alone() -> None:
    handler, results = signal.getsignal(signal.SIGALRM), []
    threads = [threading.Thread(target=lambda n=n: results.append(math_equal(f"{n}.0", str(n)))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert signal.getsignal(signal.SIGALRM) is handler


def test_missing_math_verify_is_an_error_not_a_score_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="math-verify could not be started"):
        answers._Comparer().equal("1", "2")
