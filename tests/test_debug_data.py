"""The debug recipe's data is reproducible, correct, and its test set is held out."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from opd_titan.data.sources import QUESTION_FORMAT

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "assets" / "debug"
STEP = re.compile(r"([\d+*-]+)=(\d+)")


def _load_generator() -> ModuleType:
    """Import the file, because scripts/ is not a package."""
    path = REPOSITORY / "scripts" / "make_debug_data.py"
    spec = importlib.util.spec_from_file_location("make_debug_data", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generator = _load_generator()


@pytest.fixture(scope="module")
def splits() -> dict:
    return generator.make_splits()


def _final(answer: str) -> int:
    return int(answer.split("####")[1])


def _work_ends_in_its_number(answer: str) -> bool:
    """Return whether each equation holds and the final number has their last digits."""
    (ones_left, ones), (tens_left, tens) = STEP.findall(answer)
    holds = eval(ones_left) == int(ones) and eval(tens_left) == int(tens)
    return holds and _final(answer) == 10 * int(tens) + int(ones) % 10


def test_shipped_data_is_what_the_generator_makes(splits: dict, tmp_path: Path) -> None:
    for name in ("train", "test"):
        generator.write_rows(splits[name], tmp_path / f"{name}.jsonl")
        shipped = (ASSETS / "data" / f"{name}.jsonl").read_bytes()
        assert (tmp_path / f"{name}.jsonl").read_bytes() == shipped, name


def test_no_held_out_operands_in_any_training_file(splits: dict) -> None:
    held_out = {p.operands.held_out_key for p in splits["test"]}
    assert len({key[0] for key in held_out}) == 3
    for name in ("train", "teacher_sft", "student_sft"):
        assert held_out.isdisjoint(p.operands.held_out_key for p in splits[name]), name


def test_train_and_test_answers_are_right(splits: dict) -> None:
    for problem in splits["train"] + splits["test"]:
        a, b = sorted((int(n) for n in re.findall(r"\d+", problem.question)), reverse=True)
        right = {"+": a + b, "-": a - b, "*": a * b}[problem.operands.op]
        assert _final(problem.answer) == problem.operands.result == right, problem
        assert _work_ends_in_its_number(problem.answer), problem
    assert len({p.question for p in splits["train"]}) == generator.TRAIN_ROWS


def test_the_prompt_is_the_raw_templates() -> None:
    """The script has a copy, so that it runs without the package."""
    assert generator.PROMPT.format(question="Q?") == QUESTION_FORMAT.format("Q?")
