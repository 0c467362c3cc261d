"""The grader `auto`: numbers and words in the forms that models write them in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_titan.data.sources import gsm8k
from opd_titan.grading.answers import normalize_number
from opd_titan.grading.graders import GRADERS

grade = GRADERS["auto"].score

CASES = [
    # response, gold, correct
    ("#### 70", "70", True),
    ("#### 70.0", "70", True),
    ("#### $70", "70", True),
    ("#### 1,000", "1000", True),
    ("#### 1000", "1,000", True),
    ("#### -5", "-5", True),
    ("#### \u22125", "-5", True),
    ("#### 5", "-5", False),
    ("#### 5 apples", "5", True),
    ("####72", "72", True),
    ("####\n72\n", "72", True),
    ("#### 12 + 5 = 17", "17", True),
    ("#### 3\nNo, wait.\n#### 4", "4", True),
    ("#### 3\nNo, wait.\n#### 4", "3", False),
    ("#### 1. Add them\n5 + 2 = 7\n\\boxed{7}", "7", True),
    ("## Steps\n#### Conclusion\n\nIt is 7.", "7", True),
    ("So \\boxed{42}.", "42", True),
    ("\\boxed{1} then \\boxed{2} of 9", "2", True),
    ("\\boxed{\\frac{1}{2}}", "0.5", True),
    ("\\boxed{-3\\frac{1}{2}}", "-3.5", True),
    ("\\boxed{\\dfrac{10}{5}}", "2", True),
    ("\\boxed{1{,}000\\text{ km}}", "1000", True),
    ("\\boxed{\\$70}", "70", True),
    ("\\boxed{50\\%}", "50", True),
    ("\\boxed{x = 5}", "5", True),
    ("\\boxed{5x}", "5", False),
    ("\\boxed{5, 6}", "5", False),
    ("\\boxed{\\text{72 apples}}", "72", True),
    ("\\boxed{.5}", "1/2", True),
    ("\\boxed{12", "12", True),
    ("The answer is 18. There are 3 more.", "18", True),
    ("**Answer:** 18 eggs", "18", True),
    ("The answer is $10 - 4 = 6$ dollars.", "6", True),
    ("The answer is\n\n72", "72", True),
    ("the answer is 5.50", "5.5", True),
    ("first 3, then 4 and 12 in all", "12", True),
    ("She spends 5.", "5", True),
    ("10-5", "5", True),
    ("3/4 of it", "0.75", True),
    ("3 1/2", "3.5", True),
    ("0.1", "0.1", True),
    ("0.30000000000000004", "0.3", False),
    ("no number at all", "5", False),
    ("", "5", False),
    ("<think>It is 5. #### 5</think>\n#### 6", "6", True),
    ("<think>It is 5. #### 5</think>\n#### 6", "5", False),
    ("<think>It is 5. #### 5", "5", False),
    ("It is 5.</think>The answer is 6", "6", True),
    ("The answer is B.", "B", True),
    ("The answer is B.", "C", False),
    ("\\boxed{\\text{Yes}}", "yes", True),
    ("#### Paris", "paris", True),
    ("It has 5 letters", "Paris", False),
    ("9" * 6000, "9", False),
    # several numbers are not one of them
    ("\\boxed{1,2}", "12", False),
    ("\\boxed{(1,2)}", "12", False),
    ("\\boxed{12,34}", "1234", False),
    ("#### 1,2", "12", False),
    ("\\boxed{x=5, x=-5}", "-5", False),
    ("\\boxed{x=5,y=7}", "7", False),
    ("\\boxed{1,000 + 500 = 1,500}", "1500", True),
    ("\\boxed{5 \\text{ or } 6}", "6", False),
    ("The answer is (2, 3).", "2", False),
    ("The answer is $[2,3)$", "2", False),
    ("So the total is 1,00,000.", "100000", True),
    ("\\boxed{20 000\\text{ km}}", "20000", True),
    # a part of an expression is not the expression
    ("The answer is 10^5.", "10", False),
    ("The answer is $2\\pi$.", "2", False),
    ("The answer is 5x.", "5", False),
    ("\\boxed{5 \\text{ pi}}", "5", False),
    ("\\boxed{2 \u03c0}", "2", False),
    ("\\boxed{5 x}", "5", False),
    ("\\boxed{30 sin x}", "30", False),
    ("The answer is $3\\times 10^5$.", "3", False),
    ("The answer is $3\\times 10^5$.", "300000", True),
    ("\\boxed{2.5 \\cdot 10^{-3}}", "0.0025", True),
    # signs and fractions in other forms
    ("The answer is - 5.", "-5", True),
    ("The answer is - 5.", "5", False),
    ("The answer is \u20135.", "-5", True),
    ("\\boxed{- 5}", "-5", True),
    ("10 - 5", "5", True),
    ("The answer is $\\frac34$.", "34", False),
    ("The answer is $\\frac34$.", "0.75", True),
    ("\\boxed{-\\frac12}", "-0.5", True),
    ("\\boxed{\\frac{1}2}", "0.5", True),
    # units
    ("\\boxed{10\\text{ cm}^2}", "10", True),
    ("\\boxed{10 \\text{ cm}^{2}}", "10", True),
    ("\\boxed{10^2}", "10", False),
    ("\\boxed{7^{\\circ}}", "7", True),
    ("\\boxed{5\\text{ in}}", "5", True),
    # boxes
    ("\\boxed{\\boxed{5}}", "5", True),
    ("It is \\boxed{5}, as asked for in \\boxed{}.", "5", True),
    # the whole response
    ("Paris.", "paris", True),
    ("Paris\nor so", "paris", False),
]


@pytest.mark.parametrize(("response", "gold", "correct"), CASES)
def test_grade(response: str, gold: str, correct: bool) -> None:
    assert grade(response, gold) is correct


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("70", 70),
        ("70.0", 70),
        ("70.", 70),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("+5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("1,234,567.25", Fraction(4938269, 4)),
        ("5km", 5),
        ("10 km/h", 10),
        ("1e3", 1000),
        ("-1 1/2", Fraction(-3, 2)),
        ("1/0", None),
        ("5 or 6", None),
        ("apples", None),
        ("", None),
        ("1e999999999", None),
    ],
)
def test_normalize_number(text: str, value: Fraction | None) -> None:
    assert normalize_number(text) == value


def test_every_gold_answer_of_real_gsm8k_grades_itself(shared_data) -> None:
    """Each worked answer is right for its own gold, and wrong for a gold that is one more."""
    for split, count in (("train", 7473), ("test", 1319)):
        lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            record = gsm8k(json.loads(line))
            assert grade(record.response, record.answer) is True
            for shape in ("The answer is ${}.", "\\boxed{{{}}}", "so {} it is", "#### {}.00"):
                assert grade(shape.format(record.answer), record.answer) is True, record
            assert grade(record.response, str(int(record.answer) + 1)) is False


@given(st.integers(-(10**9), 10**9), st.integers(0, 10**6))
def test_formatting_never_changes_a_number(value: int, other: int) -> None:
    for shape in ("{:,}", "{}.00", "{} apples", "${}", "\\boxed{{{}}}"):
        text = shape.format(value)
        assert grade(f"After {other} steps.\n#### {text}", str(value)) is True


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "answer is ", "1,", "1 ", "5 a-", "1 1/", "#### "]
    + ["12,", "\\frac1", "5 x 10^", "=", "= 5, ", "1 000 ", "(1, ", "}\\boxed{1"],
)
def test_degenerate_responses_take_linear_time(piece: str) -> None:
    start = time.perf_counter()
    for text in (piece * 20_000, f"The answer is {piece * 20_000}", f"\\boxed{{{piece * 20_000}}}"):
        grade(text, "5")
    assert time.perf_counter() - start < 5


def test_importing_the_grader_loads_nothing_heavy() -> None:
    code = "import sys, opd_titan.grading.answers; print({'torch','datasets'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
