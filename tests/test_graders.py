"""Graders on responses as models write them, on real gold answers, and on hostile text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_titan.config import value_types
from opd_titan.data.sources import gsm8k
from opd_titan.errors import ConfigError
from opd_titan.grading.graders import GRADERS, Grade, load_grader
from opd_titan.grading.math import MathJudge, math_judge

GSM8K = [
    # response, gold, correct, extracted
    ("5 + 2 = 7\n#### 7", "7", True, "7"),
    ("#### 1,000", "1000", True, "1,000"),
    ("#### $70", "70", True, "$70"),
    ("#### -5", "-5", True, "-5"),
    ("#### 70.00", "70", True, "70.00"),
    ("#### 50%", "50", True, "50"),
    ("#### 72.\n", "72", True, "72"),
    ("#### 3\nNo, wait.\n#### 4", "4", True, "4"),
    ("#### 3\nNo, wait.\n#### 4", "3", False, "4"),
    ("#### 18 eggs", "18", True, "18"),
    ("#### 1,2", "12", False, None),
    ("#### 12.5/3", "12", False, None),
    ("#### 1,000.5x", "1000", False, None),
    # what "auto" would take, and the strict form does not
    ("The answer is 7.", "7", False, None),
    ("\\boxed{7}", "7", False, None),
    ("#### The answer is 7", "7", False, None),
    ("#### seven", "7", False, None),
    ("####", "7", False, None),
    ("<think>#### 7</think>It is 7.", "7", False, None),
    ("<think>so it is\n#### 7", "7", False, None),
    ("<think>maybe 8</think>\n#### 7", "7", True, "7"),
    ("", "7", False, None),
]
CHOICES = [
    ("B", "B", True, "B"),
    ("B.", "B", True, "B"),
    ("(b)", "B", True, "B"),
    ("B) Paris", "B", True, "B"),
    ("The answer is (B).", "B", True, "B"),
    ("The correct answer is **C**", "C", True, "C"),
    ("Answer: D", "D", True, "D"),
    ("Answer: (d) because it is blue.", "D", True, "D"),
    ("The answer is option A.", "A", True, "A"),
    ("The best choice is C, since it rains.", "C", True, "C"),
    ("So \\boxed{A}", "A", True, "A"),
    ("So \\boxed{\\text{(C)}}.", "C", True, "C"),
    ("The answer is $\\boxed{\\textbf{E}}$", "E", True, "E"),
    ("A is wrong, for it is red.\nB is wrong too.\n\nC", "C", True, "C"),
    ("The answer is A. No, the answer is B.", "B", True, "B"),
    ("The answer is B.", "(B) Paris", True, "B"),
    ("The answer is B.", "b", True, "B"),
    ("The answer is B.", "C", False, "B"),
    ("<think>The answer is A.</think>The answer is B.", "A", False, "B"),
    ("<think>The answer is B.", "B", False, None),
    ('The answer is "B".', "B", True, "B"),
    ("The correct answer is \\(\\textbf{(B)}\\)", "B", True, "B"),
    ("\\boxed{\\text{Option B}}", "B", True, "B"),
    ("<answer>B</answer>", "B", True, "B"),
    ("The answer is clearly B.", "B", True, "B"),
    ("The correct letter is D", "D", True, "D"),
    ("Option B is correct.", "B", True, "B"),
    ("A is wrong, so (B) is the right answer.", "B", True, "B"),
    ("I think it's (C).", "C", True, "C"),
    ("The answer is B, C is wrong.", "B", True, "B"),
    ("B) Paris is right, for it is on the Seine.", "B", True, "B"),
    # more than one letter, or the question once more
    ("The answer is A, B.", "A", False, None),
    ("The answer is A/B", "A", False, None),
    ("The answer is (A) and (B).", "A", False, None),
    ("The answer is A or B", "B", False, None),
    ("A) Paris\nB) London\nC) Rome\nD) Oslo", "D", False, None),
    ("Options:\nA) Paris\nB) Rome", "B", False, None),
    ("A is not correct.", "A", False, None),
    ("It is a dog.", "A", False, None),
    # no letter is named
    ("The answer is a dog.", "A", False, None),
    ("A dog has four legs", "A", False, None),
    ("I think it is Paris", "I", False, None),
    ("The answer is Berlin.", "B", False, None),
    ("It depends.", "B", False, None),
    ("", "B", False, None),
]
EXACT = [
    ("Paris", "paris", True),
    ("  the \n Moon ", "The Moon", True),
    ("Paris.", "Paris", False),
    ("It is Paris", "Paris", False),
    ("<think>hm</think>\n\nParis", "Paris", True),
    ("<think>Paris", "Paris", False),
    ("", "Paris", False),
]
COLUMN = "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"
MATH = [
    ("So \\boxed{\\frac{1}{2}}.", "0.5", True),
    ("So $\\boxed{\\frac12}$.", "\\frac{1}{2}", True),
    ("\\boxed{\\dfrac{14}{3}}", "\\frac{14}{3}", True),
    ("\\boxed{3\\sqrt{13}}", "3\\sqrt{13}", True),
    ("\\boxed{\\sqrt{117}}", "3\\sqrt{13}", True),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", True),
    ("\\boxed{(x+1)^2}", "x^2+x+1", False),
    ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\pi/2)", True),
    ("\\boxed{(3, \\pi)}", "(\\pi, 3)", False),
    ("\\boxed{[2,5)}", "[2, 5)", True),
    ("\\boxed{[2,5]}", "[2, 5)", False),
    ("\\boxed{x = 5}", "5", True),
    ("\\boxed{70{,}000}", "70000", True),
    ("\\boxed{1, -2}", "-2,1", True),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
    (f"\\boxed{{{COLUMN}}}", COLUMN.replace(" ", ""), True),
    ("\\boxed{4} or rather \\boxed{5}", "5", True),
    ("<think>\\boxed{4}</think> \\boxed{5}", "4", False),
    ("\\boxed{3 1/2}", "31/2", False),
    ("\\boxed{1 2}", "12", False),
    ("\\boxed{1,2}", "12", False),
    ("\\boxed{3\\frac{1}{2}}", "7/2", True),
    ("\\boxed{5.}", "5", True),
    ("\\boxed{5 dollars}", "5", True),
    ("\\boxed{\\text{5 apples}}", "5", True),
    ("\\boxed{1\\,234}", "1234", True),
    ("\\boxed{5}", "\\$5", True),
    ("\\boxed{x=5}", "y=5", False),
    ("\\boxed{\\boxed{5}}", "5", True),
    ("\\boxed{}", "5", False),
    ("\\boxed{12", "13", False),
]  # fmt: skip
UNBOXED = [
    ("The final answer is $3\\sqrt{13}$.", "3\\sqrt{13}", True),
    ("It is 1/2", "0.5", True),
    ("It is 7 apples", "7", True),
    ("No idea.", "7", False),
]
HOSTILE = [
    "9^{9^{9^{9}}}",
    "123456789!",
    "\\sum_{i=1}^{10^{12}} \\sin(i)",
    "(" * 900,
    "\\frac{1}{" * 300,
    "\0\ud800\u2028",
    "__import__('os').system('touch hacked')",
    "x" * 100_000,
]


@pytest.fixture(scope="module")
def math_verify() -> Iterator[None]:
    pytest.importorskip("math_verify", reason="needs the extra: pip install 'opd_titan[math]'")
    yield
    math_judge.close()


def test_the_names_are_those_of_the_config() -> None:
    assert tuple(GRADERS) == value_types.GRADERS


@pytest.mark.parametrize(("response", "gold", "correct", "extracted"), GSM8K)
def test_gsm8k(response: str, gold: str, correct: bool, extracted: str | None) -> None:
    assert GRADERS["gsm8k"](response, gold) == Grade(correct, extracted)


@pytest.mark.parametrize(("response", "gold", "correct", "extracted"), CHOICES)
def test_choice(response: str, gold: str, correct: bool, extracted: str | None) -> None:
    assert GRADERS["choice"](response, gold) == Grade(correct, extracted)


@pytest.mark.parametrize(("response", "gold", "correct"), EXACT)
def test_exact(response: str, gold: str, correct: bool) -> None:
    assert GRADERS["exact"](response, gold).score is correct


@pytest.mark.parametrize(("response", "gold", "correct"), MATH)
def test_math_and_boxed(math_verify: None, response: str, gold: str, correct: bool) -> None:
    for name in ("math", "boxed"):
        assert GRADERS[name](response, gold).score is correct, name


@pytest.mark.parametrize(("response", "gold", "correct"), UNBOXED)
def test_only_math_takes_what_is_not_boxed(
    math_verify: None, response: str, gold: str, correct: bool
) -> None:
    assert GRADERS["math"](response, gold).score is correct
    assert GRADERS["boxed"](response, gold) == Grade(False)


def test_gold_answers_that_cannot_be_graded_are_known() -> None:
    golds = {"gsm8k": ("7", "seven"), "choice": ("(C) Rome", "Rome")}
    for name, (good, bad) in golds.items():
        assert GRADERS[name].can_grade(good) and not GRADERS[name].can_grade(bad)


def test_the_strict_form_is_that_of_real_gsm8k(shared_data: Path) -> None:
    strict = GRADERS["gsm8k"]
    for split in ("train", "test"):
        for line in (shared_data / "gsm8k" / f"{split}.jsonl").read_text().splitlines():
            record = gsm8k(json.loads(line))
            other = str(int(record.answer) + 1)
            assert strict.can_grade(record.answer)
            assert strict(record.response, record.answer).score is True, record
            assert strict(record.response, other).score is False


def test_math_on_real_gsm8k_answers(shared_data: Path, math_verify: None) -> None:
    for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:200]:
        gold = gsm8k(json.loads(line)).answer
        assert GRADERS["boxed"](f"So \\boxed{{\\${int(gold):,}.00}}.", gold).score is True, gold
        assert GRADERS["math"](f"So it is ${int(gold) + 1}$.", gold).score is False, gold


# --------------------------------------------------------------------- hostile text


def test_hostile_answers_are_wrong_in_time(
    math_verify: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is right, runs on, or ends the program; and the next one is graded as ever."""
    monkeypatch.chdir(tmp_path)
    judge = MathJudge(seconds=0.5)
    try:
        for text in HOSTILE:
            start = time.perf_counter()
            assert judge.compare_boxed(text, "5")[0] is False, text[:40]
            assert judge.compare_text(text, "5")[0] is False, text[:40]
            assert time.perf_counter() - start < 30, text[:40]
        assert judge.gave_up >= 2
        assert judge.compare_boxed("\\sqrt{9}", "3") == (True, "\\sqrt{9}")
    finally:
        judge.close()
    assert not (tmp_path / "hacked").exists()


def test_a_busy_machine_changes_no_grade(math_verify: None) -> None:
    """The other process gets no turn for longer than a comparison may take."""
    judge = MathJudge(seconds=0.5)
    try:
        assert judge.compare_boxed("1+1", "2")[0]
        pid = judge._process.pid
        os.kill(pid, signal.SIGSTOP)
        Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
        assert judge.compare_boxed("\\sqrt{9}", "3") == (True, "\\sqrt{9}")
        assert judge.gave_up == 0
    finally:
        judge.close()


def test_the_other_process_ends_with_this_one(math_verify: None) -> None:
    code = (
        "from opd_titan.grading.math import math_judge as j; import os\n"
        "j.compare_boxed('1+1', '2'); print(j._process.pid, flush=True); os._exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    status = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_math_without_its_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as where it is not installed
    for name in ("math", "boxed"):
        with pytest.raises(ConfigError) as caught:
            load_grader(name, "validation.grader")
        line = str(caught.value)
        assert line.startswith("validation.grader: ") and "'opd_titan[math]'" in line


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="#\\boxed{}answr is()$-0123456789,./ABab \n<think>", max_size=200))
def test_no_response_breaks_a_grader(text: str) -> None:
    for name in ("auto", "gsm8k", "choice", "exact"):
        for gold in ("5", "B"):
            found = GRADERS[name](text, gold)
            assert isinstance(found.score, bool) and found.correct is found.score


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "answer is ", "answer is is ", "(B", "#### 1,", "B) "]
)
@pytest.mark.parametrize("name", ["auto", "gsm8k", "choice", "exact"])
def test_degenerate_responses_take_linear_time(name: str, piece: str) -> None:
    start = time.perf_counter()
    GRADERS[name](piece * 20_000, "5")
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------- a user's own


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    name = f"own_grader_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:grade"


@pytest.mark.parametrize(
    "returned", ["len(answer) / len(response)", "answer in response", "1", "0"]
)
def test_a_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str
) -> None:
    """It gets the whole response, thinking included, and its score is taken as it is."""
    path = own(tmp_path, monkeypatch, f"def grade(response, answer):\n    return {returned}\n")
    response, answer = "<think>well", "well"
    expected = eval(returned)
    found = load_grader(path, "validation.grader")(response, answer)
    assert found.score == expected and found.correct is (expected == 1)
    assert isinstance(found.score, bool) == isinstance(expected, bool)


FAILURES = [
    ("raise KeyError('x')", "failed: KeyError: 'x'"),
    ("raise SystemExit(0)", "failed: SystemExit: 0"),
    ("return 'yes'", "failed: ValueError: could not convert"),
    ("return None", "failed: TypeError: "),
    ("return float('nan')", "returned nan; wanted"),
    ("return 2", "returned 2.0; wanted a bool, or a number from 0 to 1"),
]


@pytest.mark.parametrize(("line", "said"), FAILURES)
def test_what_ones_own_does_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    path = own(tmp_path, monkeypatch, f"def grade(response, answer):\n    {line}\n")
    grader = load_grader(path, "validation.grader")
    with pytest.raises(ConfigError) as caught:
        grader("a", "b")
    assert f"validation.grader = '{path}' {said}" in str(caught.value)


def test_a_module_that_fails_to_import_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body, said in [
        ("import no_such_package\n", "ModuleNotFoundError: No module"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    ]:
        path = own(tmp_path, monkeypatch, body)
        with pytest.raises(ConfigError, match=f"cannot be imported .{said}"):
            load_grader(path, "validation.grader")


def test_importing_the_graders_loads_nothing_heavy() -> None:
    code = "import sys, opd_titan.grading.graders; "
    code += "print({'torch', 'datasets', 'sympy', 'math_verify'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
