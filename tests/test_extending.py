"""The examples of docs/extending.md, run as they are written there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vocabulary import random_logits, rows_of

from opd_titan.data import sources
from opd_titan.data.prompts import build_prompts
from opd_titan.distill import objectives
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.errors import DataError
from opd_titan.grading.graders import GRADERS
from opd_titan.models import ModelFamily


@pytest.fixture(scope="module")
def page(repo: Path) -> str:
    return (repo / "docs" / "extending.md").read_text(encoding="utf-8")


def example(page: str, heading: str, module: Any) -> dict[str, Any]:
    """Return the names in `module` after the section's Python blocks were added to it."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    names = dict(vars(module))
    for block in blocks:
        exec(compile("from __future__ import annotations\n" + block, heading, "exec"), names)
    return names


# ---------------------------------------------------------------- a data set


@pytest.fixture
def arc(page: str) -> Iterator[None]:
    known = dict(sources.DATASETS)
    example(page, "A new data set", sources)
    yield
    sources.DATASETS.clear()
    sources.DATASETS.update(known)


def prompts(path: Path, tokenizer: Any, *rows: dict[str, Any]) -> list[Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_prompts(
        dataset="arc",
        path=str(path),
        split="train",
        template="raw",
        enable_thinking=False,
        max_prompt_tokens=1000,
        tokenizer=tokenizer,
        keep_responses=False,
    ).prompts


ROW = {
    "question": "Which is a metal?",
    "choices": {"label": ["A", "B"], "text": ["wood", "iron"]},
    "answerKey": "B",
}


def test_the_data_set_gives_prompts_that_can_be_graded(arc, tiny, tmp_path) -> None:
    (prompt,) = prompts(tmp_path / "train.jsonl", tiny, ROW)
    assert prompt.text.splitlines()[:3] == ["Which is a metal?", "A. wood", "B. iron"]
    assert prompt.text.endswith("\\boxed{}.") and prompt.response is None
    assert GRADERS["auto"].score("Iron is one. \\boxed{B}", prompt.answer)
    assert not GRADERS["auto"].score("Wood: \\boxed{A}", prompt.answer)


def test_its_mistakes_name_file_and_line(arc, tiny, tmp_path) -> None:
    short = {"choices": {"label": ["A"], "text": ["wood", "iron"]}}
    with pytest.raises(DataError, match="train.jsonl, line 2.*choices"):
        prompts(tmp_path / "train.jsonl", tiny, ROW, ROW | short)


# ---------------------------------------------------------------- an objective


@pytest.mark.parametrize("coef", [0.0, 0.4])
def test_the_objective_and_its_derivative_are_those_of_the_plain_formula(
    page: str, coef: float
) -> None:
    example(page, "A new objective", objectives)
    total_variation = OBJECTIVES.pop("total_variation")
    student_CV, teacher_CV, reference_CV = (random_logits(50, 17, seed) for seed in range(3))
    student_CV.requires_grad_()
    s_CV, t_CV, r_CV = (x.log_softmax(1) for x in (student_CV, teacher_CV, reference_CV))
    plain_C = 0.5 * (s_CV.exp() - t_CV.exp()).abs().sum(1)
    plain_C = plain_C + coef * (s_CV.exp() * (s_CV - r_CV)).sum(1)
    (truth_CV,) = torch.autograd.grad(plain_C.sum(), student_CV)
    settings = ObjectiveSettings(reference_coef=coef)
    assert total_variation.needs_vocabulary(settings)
    found = total_variation(rows_of(student_CV, teacher_CV, reference_CV), settings)
    torch.testing.assert_close(found.loss_C, plain_C.detach())
    torch.testing.assert_close(found.dlogits_Cv, truth_CV)


# ---------------------------------------------------------------- a model family


def test_the_table_has_every_field_of_a_family(page: str) -> None:
    section = page.split("\n## A new model family\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
        f.name for f in fields(ModelFamily)
    ]
