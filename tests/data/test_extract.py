"""Reading answers out of responses, and what the libraries that compare them make of what was read."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from math_verify import ExprExtractionConfig, StringExtractionConfig, parse

from prune_opd.config.run import READERS
from prune_opd.data.answers import last_boxed, math_equal
from prune_opd.data.extract import read_answer

SAID = "So, the final answer is 48."
PIECES = st.sampled_from([*"48B(){}.-$ \n", "\\boxed", "</think>", "answer is "])
TEXTS = st.lists(PIECES, max_size=40).map("".join)


@pytest.mark.parametrize(
    ("text", "box", "number", "either"),
    [
        (SAID, None, "48", "48"),
        (r"so \boxed{48}.", "48", "48", "48"),
        (r"\boxed{} is empty", None, None, None),
        (r"48, so \boxed{}.", None, "48", "48"),
        (r"\boxed{1}, no: \boxed{2}, in step 3", "2", "3", "2"),
        (r"\boxed{2} and \boxed{x + 1", None, "1", "1"),
        (r"<think>\boxed{3}, or 5?</think> The answer is 4.", "3", "4", "4"),
        ("<think>It is 3.</think> I am not sure.", None, "3", "3"),
        (r"<think>7</think> So \boxed{8}", "8", "8", "8"),
        (r"What is 6 + 20? 6 + 20 = 26.", None, "26", "26"),
        ("26, because of 6 + 20.", None, "20", "20"),
        ("I cannot tell.", None, None, None),
        ("", None, None, None),
    ],
)
def test_a_box_a_number_or_either(text: str, box: str | None, number: str | None, either: str | None) -> None:
    assert read_answer(text, "box") == box
    assert read_answer(text, "last_number") == number
    assert read_answer(text, "box_or_last_number") == either


NUMBERS = [
    ("It costs $1,234.50.", "1,234.50", "1234.5"),
    ("That is 1{,}000 in all", "1{,}000", "1000"),
    ("100,000,000", "100,000,000", "100000000"),
    ("x=-5", "-5", "-5"),
    ("it is −5.", "-5", "-5"),
    ("a debt of -$5", "-5", "-5"),
    ("$-5$", "-5", "-5"),
    ("+3", "+3", "3"),
    ("it is 8-5", "5", "5"),
    (".5", ".5", "1/2"),
    ("0.50.", "0.50", "1/2"),
    ("about ...48", "48", "48"),
    ("3/4", "3/4", "0.75"),
    (r"$-\frac{3}{4}$", r"-\frac{3}{4}", "-0.75"),
    (r"\dfrac12", r"\dfrac12", "0.5"),
    ("48%", "48%", "48"),
    (r"48\% of them", r"48\%", "0.48"),
    ("**48**", "48", "48"),
    ("(48)", "48", "48"),
    ("48km", "48", "48"),
    ("12, 34", "34", "34"),
    ("1,2345", "2345", "2345"),
    ("in 2020,500", "500", "500"),
    ("48 drops of H2O in a5", "48", "48"),
]


@pytest.mark.parametrize(("text", "read", "value"), NUMBERS)
def test_the_last_number_is_read_whole_and_equals_its_value(text: str, read: str, value: str) -> None:
    given_answer = read_answer(text, "last_number")
    assert given_answer == read
    assert math_equal(given_answer, value) and not math_equal(given_answer, f"({value}) + 7")


@pytest.mark.parametrize(
    "text", [SAID, "It costs $1,234.50 in all.", "It is -5.", "3/4", "2,500 apples", "it is .5", "6 + 20 = 26", "48 km"]
)
def test_a_single_number_is_the_one_that_math_verify_reads(text: str) -> None:
    value, _ = parse(text, [ExprExtractionConfig()], parsing_timeout=None)
    answer = read_answer(text, "last_number")
    assert answer is not None and math_equal(answer, str(value))


CHOICES = [
    ("B", "B"),
    ("B. Paris", "B"),
    ("**B**", "B"),
    ("The answer is B.", "B"),
    ("Answer: C", "C"),
    ("answer: **C**", "C"),
    ("Answer:\n\nD", "D"),
    ("I think C is wrong, so the answer is D", "D"),
    ("The final answer is: C", "C"),
]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *CHOICES,
        ("(B)", "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(C) } 42}", "C"),
        (r"The answer to this question is $\textbf{(E)}$.", "E"),
        ("The correct answer: option J", "J"),
        ("First (A), but then (D).", "D"),
        ("The answer is B because (C) is wrong.", "B"),
        ("The answer is A. No, the answer is (C).", "C"),
        ("<think>The answer is B.</think>\n(C)", "C"),
        ("The answer is I.", "I"),
        ("The answer is I think (B)", "B"),
        ("The answer is not A.", None),
        ("The answer is Because of rain", None),
        ("I have no answer. A dog barked, and B did not.", None),
        ("The answer is K.", None),
        ("the answer is b", None),
        ("A good day", None),
        (SAID, None),
        ("", None),
    ],
)
def test_a_choice_is_the_last_letter_that_is_given_as_an_answer(text: str, letter: str | None) -> None:
    assert read_answer(text, "choice") == letter


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_a_choice_is_the_letter_that_math_verify_reads(text: str, letter: str) -> None:
    config = StringExtractionConfig(strings=tuple("ABCDEFGHIJ"), lowercase=False)
    assert parse(text, [config], parsing_timeout=None)[0] == read_answer(text, "choice") == letter


@pytest.mark.parametrize(("right", "answer"), [("B", True), ("(B)", True), (r"\text{B}", True), ("C", False)])
def test_a_choice_equals_the_same_letter_in_brackets(right: str, answer: bool) -> None:
    assert math_equal("B", right) is answer


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"#### *(\S+)", "16 - 7 = 9\n#### 9", "9"),
        (r"[Aa]nswer is (.+)", SAID, "48"),
        (r"[Aa]nswer is (.+)", "The answer is 1.\nNo, the answer is 2.", "2"),
        (r"[Aa]nswer is (.+)", "the answer is  .", None),
        (r"\d+", "1 2 3", "3"),
        (r"yes|(no)", "no, yes", None),
        (r"(\w+) or (\w+)", "tea or milk", "tea"),
        (r"x = (.+)", SAID, None),
    ],
)
def test_a_pattern_reads_its_first_group_of_the_last_match(pattern: str, text: str, answer: str | None) -> None:
    assert read_answer(text, f"regex:{pattern}") == answer


@given(TEXTS)
def test_the_box_is_the_last_one_that_holds_anything_whatever_stands_around_it(text: str) -> None:
    assert read_answer(text, "box") == (last_boxed(text) or None)


@given(TEXTS)
@example("-$4")
def test_whatever_is_read_stands_in_the_text_and_is_not_empty(text: str) -> None:
    """But for a currency's mark between a sign and its number: -$4 is -4."""
    unmarked = text.replace("\\$", "").replace("$", "")
    for extract in (*READERS, r"regex:\S+"):
        answer = read_answer(text, extract)
        assert answer is None or answer.strip() == answer != "", extract
        assert answer is None or answer in text or answer in unmarked, extract


@given(TEXTS)
def test_either_reads_wherever_one_of_the_two_does(text: str) -> None:
    box, number, either = (read_answer(text, extract) for extract in ("box", "last_number", "box_or_last_number"))
    assert either in {box, number} and (either is None) == (box is None and number is None)


@pytest.mark.timeout(60)
def test_reading_a_long_text_takes_time_in_proportion_to_its_length() -> None:
    """Responses that repeat what a reader looks for; a pattern of quadratic time took minutes for empty lines."""
    for piece in ("answer ", "1,000,", "\\frac{", "((((", "* * *\n", "- ", "$", "answer is : ", "\n", "\\boxed"):
        text = piece * (60_000 // len(piece))
        for extract in READERS:
            read_answer(text, extract)
