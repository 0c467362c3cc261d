"""The default command recovers the gap, and its samples show why."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("debug")
    command = ["./scripts/run_train.sh", "--job.dump_folder", str(folder)]
    command += ["--metrics.sample_rollouts", "-1"]
    env = {k: v for k, v in os.environ.items() if k not in ("CONFIG_FILE", "NGPU")}
    subprocess.run(command, cwd=repo, env=env, check=True, capture_output=True)
    return folder


def test_four_fifths_of_the_gap_are_recovered(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    accuracy = [e.value for e in events.Scalars("validation/accuracy")]
    (teacher,) = {e.value for e in events.Scalars("validation/teacher_accuracy")}
    assert teacher >= 0.95
    assert accuracy[0] <= 0.35 * teacher
    assert events.Scalars("validation/gap_recovered")[-1].value >= 0.8
    kl = [e.value for e in events.Scalars("kl/student_teacher")]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_the_teacher_disagrees_exactly_at_the_misconception(finished: Path, repo: Path) -> None:
    """One token of a wrong answer has a low advantage: `carry 0`, `borrow 0`, or + instead of *."""
    tokenizer = AutoTokenizer.from_pretrained(repo / "assets" / "debug" / "student")
    rows = [json.loads(line) for line in (finished / "rollouts" / "step-1.jsonl").open()]
    wrong = [row for row in rows if row["correct"] is False]
    right = [row for row in rows if row["correct"]]
    assert len(wrong) > 30 and len(right) > 30
    at_the_decision = 0
    for row in wrong:
        worst = min(range(len(row["advantages"])), key=row["advantages"].__getitem__)
        before = tokenizer.decode(row["response_tokens"][:worst])
        token = tokenizer.decode(row["response_tokens"][worst])
        forgotten = before.rstrip().endswith(("carry", "borrow")) and token.strip() == "0"
        at_the_decision += forgotten or (token == "+" and "," not in before)
    assert at_the_decision >= 0.95 * len(wrong)
    blame = sum(min(row["advantages"]) for row in wrong) / len(wrong)
    elsewhere = sum(sum(row["advantages"]) - min(row["advantages"]) for row in wrong) / len(wrong)
    assert blame < -1.0
    assert abs(elsewhere) < 0.2 * abs(blame)
