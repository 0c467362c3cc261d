"""Graders on typical responses, real gold answers and degenerate text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_titan.data.sources import gsm8k
from opd_titan.grading.graders import GRADERS, Grade
from opd_titan.grading.math import math_judge
from opd_titan.grading.numbers import parse_number

# Rows of the tables below: response, gold answer, whether it is right, and the answer found.
AUTO = [
    ("#### 70.0", "70", True),
    ("#### 1,000", "1000", True),
    ("#### \u22125", "-5", True),
    ("#### 5 apples", "5", True),
    ("####\n72\n", "72", True),
    ("#### 12 + 5 = 17", "17", True),
    ("#### 3\nNo, wait.\n#### 4", "4", True),
    ("#### 1. Add them\n5 + 2 = 7\n\\boxed{7}", "7", True),
    ("## Steps\n#### Conclusion\n\nIt is 7.", "7", True),
    ("\\boxed{1} then \\boxed{2} of 9", "2", True),
    ("\\boxed{\\frac{1}{2}}", "0.5", True),
    ("\\boxed{-3\\frac{1}{2}}", "-3.5", True),
    ("\\boxed{1{,}000\\text{ km}}", "1000", True),
    ("\\boxed{\\$70}", "70", True),
    ("\\boxed{50\\%}", "50", True),
    ("\\boxed{x = 5}", "5", True),
    ("\\boxed{5x}", "5", False),
    ("\\boxed{.5}", "1/2", True),
    ("\\boxed{12", "12", True),
    ("The answer is 18. There are 3 more.", "18", True),
    ("**Answer:** 18 eggs", "18", True),
    ("The answer is $10 - 4 = 6$ dollars.", "6", True),
    ("The answer is\n\n72", "72", True),
    ("first 3, then 4 and 12 in all", "12", True),
    ("10-5", "5", True),
    ("3/4 of it", "0.75", True),
    ("3 1/2", "3.5", True),
    ("0.30000000000000004", "0.3", False),
    ("no number at all", "5", False),
    ("<think>It is 5. #### 5</think>\n#### 6", "6", True),
    ("<think>It is 5. #### 5", "5", False),
    ("It is 5.</think>The answer is 6", "6", True),
    ("It is 5.</think>#### 5</think>Or is it?", "5", False),
    ("9" * 6000, "9", False),
    # words
    ("The answer is B.", "B", True),
    ("\\boxed{\\text{Yes}}", "yes", True),
    ("#### Paris", "paris", True),
    ("It has 5 letters", "Paris", False),
    ("Paris.", "paris", True),
    ("Paris\nor so", "paris", False),
    # several numbers are not one of them
    ("\\boxed{1,2}", "12", False),
    ("\\boxed{12,34}", "1234", False),
    ("#### 1,2", "12", False),
    ("\\boxed{x=5, x=-5}", "-5", False),
    ("\\boxed{1,000 + 500 = 1,500}", "1500", True),
    ("\\boxed{5 \\text{ or } 6}", "6", False),
    ("The answer is (2, 3).", "2", False),
    ("The answer is $[2,3)$", "2", False),
    ("So the total is 1,00,000.", "100000", True),
    ("\\boxed{20 000\\text{ km}}", "20000", True),
    ("It is 1\u202f234\u202f000 in all", "1234000", True),
    ("The chances are 1 200/300", "1200", False),
    # a part of an expression is not the expression
    ("The answer is 10^5.", "10", False),
    ("The answer is $2\\pi$.", "2", False),
    ("The answer is 5x.", "5", False),
    ("\\boxed{5 \\text{ pi}}", "5", False),
    ("\\boxed{5 x}", "5", False),
    ("The answer is $3\\times 10^5$.", "300000", True),
    ("\\boxed{2.5 \\cdot 10^{-3}}", "0.0025", True),
    # signs and fractions in other forms
    ("The answer is - 5.", "-5", True),
    ("The answer is \u20135.", "-5", True),
    ("\\boxed{- 5}", "-5", True),
    ("10 - 5", "5", True),
    ("The answer is $\\frac34$.", "0.75", True),
    ("\\boxed{-\\frac12}", "-0.5", True),
    ("\\boxed{\\frac{1}2}", "0.5", True),
    # units
    ("\\boxed{10\\text{ cm}^2}", "10", True),
    ("\\boxed{10^2}", "10", False),
    ("\\boxed{7^{\\circ}}", "7", True),
    # boxes in a box, and an empty one
    ("\\boxed{\\boxed{5}}", "5", True),
    ("It is \\boxed{5}, as asked for in \\boxed{}.", "5", True),
    ("\\boxed{5} and \\{ \\boxed{6", "5", True),
]
GSM8K = [
    ("5 + 2 = 7\n#### 7", "7", True, "7"),
    ("#### 1,000", "1000", True, "1,000"),
    ("#### $70", "70", True, "$70"),
    ("#### -5", "-5", True, "-5"),
    ("#### 50%", "50", True, "50"),
    ("#### 72.\n", "72", True, "72"),
    ("#### 3\nNo, wait.\n#### 4", "3", False, "4"),
    ("#### 18 eggs", "18", True, "18"),
    ("#### 1,2", "12", False, None),
    ("#### 12.5/3", "12", False, None),
    # what "auto" takes, and the strict form does not
    ("The answer is 7.", "7", False, None),
    ("#### The answer is 7", "7", False, None),
    ("<think>maybe 8</think>\n#### 7", "7", True, "7"),
]
CHOICE = [
    ("B", "B", True, "B"),
    ("(b)", "B", True, "B"),
    ("B) Paris", "B", True, "B"),
    ("The answer is (B).", "(B) Paris", True, "B"),
    ("The correct answer is **C**", "C", True, "C"),
    ("Answer: (d) because it is blue.", "D", True, "D"),
    ("The answer is option A.", "A", True, "A"),
    ("The best choice is C, since it rains.", "C", True, "C"),
    ("So \\boxed{\\text{(C)}}.", "C", True, "C"),
    ("A is wrong, for it is red.\nB is wrong too.\n\nC", "C", True, "C"),
    ("The answer is A. No, the answer is B.", "B", True, "B"),
    ("The answer is B.", "C", False, "B"),
    ("<think>The answer is A.</think>The answer is B.", "A", False, "B"),
    ('The answer is "B".', "B", True, "B"),
    ("The correct answer is \\(\\textbf{(B)}\\)", "B", True, "B"),
    ("\\boxed{\\text{Option B}}", "B", True, "B"),
    ("<answer>B</answer>", "B", True, "B"),
    ("The answer is clearly B.", "B", True, "B"),
    ("Option B is correct.", "B", True, "B"),
    ("A is wrong, so (B) is the right answer.", "B", True, "B"),
    ("I think it's (C).", "C", True, "C"),
    ("The answer is B, C is wrong.", "B", True, "B"),
    ("B) Paris is right, for it is on the Seine.", "B", True, "B"),
    # more than one letter, or the question once more
    ("The answer is A, B.", "A", False, None),
    ("The answer is (A) and (B).", "A", False, None),
    ("A) Paris\nB) London\nC) Rome\nD) Oslo", "D", False, None),
    ("A is not correct.", "A", False, None),
    # no letter is named
    ("The answer is a dog.", "A", False, None),
    ("A dog has four legs", "A", False, None),
    ("I think it is Paris", "I", False, None),
    ("The answer is Berlin.", "B", False, None),
]
EXACT = [
    ("  the \n Moon ", "The Moon", True, "the moon"),
    ("Paris.", "Paris", False, "paris."),
    ("<think>hm</think>\n\nParis", "Paris", True, "paris"),
]
COLUMN = "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"
# Rows for "math" and "boxed".
BOXED = [
    ("So $\\boxed{\\frac12}$.", "0.5", True),
    ("\\boxed{\\sqrt{117}}", "3\\sqrt{13}", True),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", True),
    ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\pi/2)", True),
    ("\\boxed{(3, \\pi)}", "(\\pi, 3)", False),
    ("\\boxed{[2,5]}", "[2, 5)", False),
    ("\\boxed{x=5}", "y=5", False),
    ("\\boxed{1, -2}", "-2,1", True),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
    (f"\\boxed{{{COLUMN}}}", COLUMN.replace(" ", ""), True),
    ("<think>\\boxed{4}</think> \\boxed{5}", "4", False),
    ("\\boxed{3 1/2}", "31/2", False),
    ("\\boxed{1 2}", "12", False),
    ("\\boxed{1,2}", "12", False),
    ("\\boxed{3\\frac{1}{2}}", "7/2", True),
    ("\\boxed{5.}", "5", True),
    ("\\boxed{\\text{5 apples}}", "5", True),
    ("\\boxed{1\\,234}", "1234", True),
    ("\\boxed{5}", "\\$5", True),
    ("\\boxed{}", "5", False),
]
UNBOXED = [
    ("The final answer is $3\\sqrt{13}$.", "3\\sqrt{13}", True),
    ("It is 1/2", "0.5", True),
    ("No idea.", "7", False),
]


@pytest.fixture(scope="module")
def math_verify() -> Iterator[None]:
    pytest.importorskip("math_verify", reason="needs the extra: pip install 'opd_titan[math]'")
    yield
    math_judge.close()


@pytest.mark.parametrize(("response", "gold", "correct"), AUTO)
def test_auto(response: str, gold: str, correct: bool) -> None:
    assert GRADERS["auto"].score(response, gold) is correct


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (name, row)
        for name, rows in {"gsm8k": GSM8K, "choice": CHOICE, "exact": EXACT}.items()
        for row in rows
    ],
)
def test_gsm8k_choice_and_exact(name: str, row: tuple[str, str, bool, str | None]) -> None:
    response, gold, correct, extracted = row
    assert GRADERS[name](response, gold) == Grade(correct, extracted)


@pytest.mark.parametrize(("response", "gold", "correct"), BOXED)
def test_math_and_boxed(math_verify: None, response: str, gold: str, correct: bool) -> None:
    for name in ("math", "boxed"):
        assert GRADERS[name](response, gold).score is correct, name


@pytest.mark.parametrize(("response", "gold", "correct"), UNBOXED)
def test_only_math_takes_what_is_not_boxed(
    math_verify: None, response: str, gold: str, correct: bool
) -> None:
    assert GRADERS["math"](response, gold).score is correct
    assert GRADERS["boxed"](response, gold) == Grade(False)


def test_thinking_that_does_not_end_is_wrong(math_verify: None) -> None:
    for grader in GRADERS.values():
        assert grader("<think>So it is \\boxed{5}\n#### 5", "5") == Grade(False), grader.name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("70.", 70),
        ("-.5", Fraction(-1, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("1,234,567.25", Fraction(4938269, 4)),
        ("10 km/h", 10),
        ("1e3", 1000),
        ("1/0", None),
        ("apples", None),
        ("1e999999999", None),
    ],
)
def test_parse_number(text: str, value: Fraction | None) -> None:
    assert parse_number(text) == value


def test_gold_answers_that_cannot_be_graded_are_known() -> None:
    for name, good, bad in [("gsm8k", "7", "seven"), ("choice", "(C) Rome", "Rome")]:
        assert GRADERS[name].can_grade(good) and not GRADERS[name].can_grade(bad)
        assert GRADERS[name].score("anything", bad) is None


def test_real_gsm8k(shared_data: Path) -> None:
    """Each worked answer is right for its own gold answer, and wrong for another one."""
    auto, strict = GRADERS["auto"].score, GRADERS["gsm8k"].score
    for split, step in (("train", 10), ("test", 1)):
        lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        for line in lines[::step]:
            record = gsm8k(json.loads(line))
            response, gold, other = record.response, record.answer, str(int(record.answer) + 1)
            assert auto(response, gold) is strict(response, gold) is True, record
            assert auto(response, other) is strict(response, other) is False, record
            for shape in ("The answer is ${}.", "\\boxed{{{}}}", "so {} it is", "#### {}.00"):
                assert auto(shape.format(gold), gold) is True, record


def test_math_on_real_gsm8k_answers(shared_data: Path, math_verify: None) -> None:
    for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:200]:
        gold = gsm8k(json.loads(line)).answer
        assert GRADERS["boxed"](f"So \\boxed{{\\${int(gold):,}.00}}.", gold).score is True, gold
        assert GRADERS["math"](f"So it is ${int(gold) + 1}$.", gold).score is False, gold


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(0, 10**6))
def test_formatting_never_changes_a_number(value: int, other: int) -> None:
    for shape in ("{:,}", "{}.00", "{} apples", "${}", "\\boxed{{{}}}"):
        text = f"After {other} steps.\n#### {shape.format(value)}"
        assert GRADERS["auto"].score(text, str(value)) is True


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="#\\boxed{}answr is()$-0123456789,./ABab \n<think>", max_size=200))
def test_no_response_breaks_a_grader(text: str) -> None:
    for name in ("auto", "gsm8k", "choice", "exact"):
        for gold in ("5", "B"):
            assert isinstance(GRADERS[name](text, gold).score, bool)


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "}\\boxed{1", "answer is ", "answer is is ", "(B", "B) ", "#### 1,", "1,", "12,"]
    + ["1 ", "1 1/", "1 000 ", "5 a-", "\\frac1", "5 x 10^", "=", "= 5, ", "(1, "],
)
def test_degenerate_responses_take_linear_time(piece: str) -> None:
    start, text = time.process_time(), piece * 20_000
    for response in (text, f"The answer is {text}", f"\\boxed{{{text}}}"):
        for name in ("auto", "gsm8k", "choice", "exact"):
            GRADERS[name](response, "5")
    assert time.process_time() - start < 10
