"""Loading of graders, a user's own graders, and the process that compares LaTeX."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from programs import run_python

from opd_titan.config import value_types
from opd_titan.errors import ConfigError, Fault
from opd_titan.grading.graders import GRADERS, load_grader
from opd_titan.grading.math import MathJudge

KEY = "validation.grader"
HOSTILE = [
    "9^{9^{9^{9}}}",
    "(" * 900,
    "\0\ud800\u2028",
    "__import__('os').system('touch hacked')",
]


def test_the_names_are_those_of_the_config() -> None:
    assert tuple(GRADERS) == value_types.GRADERS
    assert all(load_grader(name, KEY).name == name for name in ("auto", "gsm8k", "choice", "exact"))


def test_importing_the_graders_loads_nothing_heavy() -> None:
    code = "import sys, opd_titan.grading.graders; "
    code += "print({'torch', 'datasets', 'sympy', 'math_verify'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"


# ------------------------------------------------------- the process that compares LaTeX


@pytest.fixture
def judge() -> MathJudge:
    pytest.importorskip("math_verify", reason="needs the extra: pip install 'opd_titan[math]'")
    judge = MathJudge(seconds=1.0)
    yield judge
    judge.close()


def test_hostile_answers_are_wrong_in_time(
    judge: MathJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is right, takes long, or ends the program, and the next one is graded."""
    monkeypatch.chdir(tmp_path)
    for text in HOSTILE:
        start = time.perf_counter()
        assert judge.equals(text, "5") is False, text[:40]
        assert judge.find(text, "5")[0] is False, text[:40]
        assert time.perf_counter() - start < 30, text[:40]
    assert judge.gave_up >= 2
    assert judge.equals("\\sqrt{9}", "3")
    assert not (tmp_path / "hacked").exists()


def test_a_busy_machine_changes_no_grade(judge: MathJudge) -> None:
    """The process is stopped for longer than a comparison may take."""
    assert judge.equals("1+1", "2")
    pid = judge._process.pid
    os.kill(pid, signal.SIGSTOP)
    Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
    assert judge.equals("\\sqrt{9}", "3")
    assert judge.gave_up == 0


def test_signals_to_the_job_change_no_grade(judge: MathJudge) -> None:
    """A scheduler sends them to every process; the job may want to finish its validation."""
    assert judge.equals("1+1", "2")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(judge._process.pid, number)
    assert judge.equals("\\sqrt{9}", "3")
    assert judge.gave_up == 0


def test_a_broken_installation_is_a_fault_and_not_wrong_answers(
    judge: MathJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Fault, match="math-verify does not start"):
        judge.equals("1+1", "2")


def test_the_other_process_ends_with_this_one(judge: MathJudge) -> None:
    code = (
        "from opd_titan.grading.math import math_judge as j; import os\n"
        "j.equals('1+1', '2'); print(j._process.pid, flush=True); os._exit(3)"
    )
    done = run_python("-c", code)
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
            load_grader(name, KEY)
        line = str(caught.value)
        assert line.startswith(f"{KEY}: ") and "'opd_titan[math]'" in line


# ------------------------------------------------------------------- a user's own grader


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    name = f"own_grader_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:grade"


@pytest.mark.parametrize("returned", ["len(answer) / len(response)", "answer in response", "1"])
def test_a_users_own_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str
) -> None:
    """It gets the whole response, thinking included, and its score is not changed."""
    path = own(tmp_path, monkeypatch, f"def grade(response, answer):\n    return {returned}\n")
    response, answer = "<think>well", "well"
    expected = eval(returned)
    found = load_grader(path, KEY)(response, answer)
    assert found.score == expected
    assert isinstance(found.score, bool) == isinstance(expected, bool)


FAILURES = [
    ("raise KeyError('x')", "failed: KeyError: 'x'"),
    ("raise SystemExit(0)", "failed: SystemExit: 0"),
    ("return 'yes'", "failed: ValueError: could not convert"),
    ("return float('nan')", "returned nan; expected"),
    ("return 2", "returned 2.0; expected a bool, or a number from 0 to 1"),
]


@pytest.mark.parametrize(("line", "said"), FAILURES)
def test_an_error_of_a_users_own_function_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    path = own(tmp_path, monkeypatch, f"def grade(response, answer):\n    {line}\n")
    grader = load_grader(path, KEY)
    with pytest.raises(ConfigError) as caught:
        grader("a", "b")
    assert f"{KEY} = '{path}' {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import sys\nsys.exit(0)\n", "cannot be imported (SystemExit: 0)"),
        ("", "cannot be imported (AttributeError"),
        ("def grade(response): pass\n", "cannot be called as function(response, answer)"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    path = own(tmp_path, monkeypatch, body)
    with pytest.raises(ConfigError) as caught:
        load_grader(path, KEY)
    assert f"{KEY}: '{path}' {said}" in str(caught.value)
