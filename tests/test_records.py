"""Files of rollouts, dumps of skipped updates, profiler traces."""

from __future__ import annotations

import gzip
import json
import logging
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_student import one_process_group

from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.update import UpdateResult
from opd_titan.grading.graders import GRADERS
from opd_titan.observability.profiling import maybe_profiler
from opd_titan.observability.rollout_writer import repetition, write_rollouts
from opd_titan.training.nonfinite import NonfiniteUpdates

# ---- rollouts ----


def make_sample(index: int, sample_index: int, answer: str | None = "4", **scores) -> Sample:
    prompt = Prompt(index=index, text=f"caf\u00e9 {index}?", token_ids=(1, 2), answer=answer)
    scores = {"student_logprobs": [-0.5, -1.25], **scores}
    return Sample(prompt, sample_index, [ord("4"), 10], "stop", **scores)


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def grade(response: str, answer: str) -> bool:
    return response.strip() == answer


def read_rollouts(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_has_the_keys_and_values_of_the_design(tmp_path):
    scored = make_sample(7, 0, teacher_logprobs=[-0.25, -2.0], advantages=[0.25, -0.75])
    samples = [make_sample(3, 1, answer=None), scored, make_sample(3, 0), make_sample(7, 1)]
    path = write_rollouts(tmp_path / "rollouts", 12, samples, decode, grade)
    assert path == tmp_path / "rollouts" / "step-12.jsonl"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    rows = read_rollouts(path)
    # Prompts in the order in which they first appear.
    found = [(row["prompt_index"], row["sample_index"]) for row in rows]
    assert found == [(3, 0), (3, 1), (7, 0), (7, 1)]
    _, ungraded, first, _ = rows
    contract = {
        "step": 12,
        "prompt_index": 7,
        "sample_index": 0,
        "prompt": "caf\u00e9 7?",
        "response": "4\n",
        "prompt_tokens": [1, 2],
        "response_tokens": [52, 10],
        "student_logprobs": [-0.5, -1.25],
        "teacher_logprobs": [-0.25, -2.0],
        "reference_logprobs": None,
        "advantages": [0.25, -0.75],
        "finish_reason": "stop",
        "answer": "4",
        "correct": True,
    }
    assert {key: first[key] for key in contract} == contract
    assert all(first[key] is None for key in first.keys() - contract.keys())
    assert ungraded.keys() == first.keys()
    assert ungraded["answer"] is ungraded["correct"] is None


def test_rollouts_are_valid_json_whatever_the_values(tmp_path):
    numbers = [float("nan"), float("-inf")]
    third = torch.tensor(-1 / 3).item()
    sample = make_sample(1, 0, student_logprobs=numbers, teacher_logprobs=[third, -0.0])
    strange = 'a\u2028b\x85c\u2029d\ud83de\r\n\x00"\\\U0001f600'
    path = write_rollouts(tmp_path, 1, [sample], lambda ids: strange, grade)
    raw = path.read_bytes().decode("utf-8")
    assert len(raw.splitlines()) == 1

    def reject(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads(raw, parse_constant=reject)
    assert row["response"] == strange
    assert row["student_logprobs"] == [None, None]
    assert row["teacher_logprobs"] == [-0.3333333, 0.0]


def test_the_grader_knows_of_thinking_that_the_prompt_began(tmp_path):
    sample = make_sample(1, 0)
    sample.prompt = replace(sample.prompt, text="assistant\n<think>\n")
    (row,) = read_rollouts(write_rollouts(tmp_path, 1, [sample], decode, GRADERS["auto"].score))
    assert (row["response"], row["correct"]) == ("4\n", False)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_rollouts(tmp_path, 1, [make_sample(1, 0)], decode, grade)
    before = path.read_bytes()

    def broken(response: str, answer: str) -> bool:
        raise RuntimeError("grader")

    with pytest.raises(RuntimeError):
        write_rollouts(tmp_path, 1, [make_sample(2, 0)], decode, broken)
    assert path.read_bytes() == before


def test_a_skipped_update_is_reported_with_where_its_batch_is(tmp_path, monkeypatch, caplog):
    result = UpdateResult({}, [True, False], [make_sample(1, 0)])
    logger = logging.getLogger("opd_titan")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    with one_process_group():
        for start in (1, 8, 15):  # a run that is started again does a few steps once more
            skipped = NonfiniteUpdates(100, tmp_path, decode, grade)
            for step in range(start, start + 8):
                skipped.check(step, result)
        (tmp_path / "nonfinite" / "rank-0").rename(tmp_path / "moved")
        (tmp_path / "nonfinite" / "rank-0").write_text("")
        skipped.check(23, result)
    assert len(list((tmp_path / "moved").iterdir())) == 20
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert all("1 of 2 updates skipped" in w for w in warnings) and len(warnings) == 25
    assert [w.endswith("batch was not written") for w in warnings] == [False] * 22 + [True] * 3
    assert all(w.endswith(f"batch is in {tmp_path}/nonfinite") for w in warnings[:22])


def test_repetition_orders_texts():
    prose = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
        "in May. In May she therefore sold 48 / 2 = 24 clips. Altogether that makes 48 + 24 = 72 "
        "clips over the two months, which is the number that was asked for."
    )
    loop = "the answer is 7. " * 40
    noise = "".join(random.Random(0).choices(string.printable, k=300))
    assert 0.0 <= repetition(noise) < repetition(prose) < 0.6 < 0.9 < repetition(loop) < 1.0
    assert repetition(prose + loop) > repetition(prose)
    assert repetition("") == repetition("7") == repetition("short") == 0.0
    assert 0.0 <= repetition("\ud83d") <= 1.0


# ---- profiler ----


def test_profiler_leaves_one_trace_per_rank_and_interval(tmp_path):
    with maybe_profiler(True, 3, tmp_path, rank=1, start_step=5) as profiler:
        for _ in range(6, 15):  # steps 6 to 14; step 15 would be next
            torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()
    folders = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert folders == ["step-12", "step-6", "step-9"]
    for folder in folders:
        [trace] = (tmp_path / "profile" / folder).iterdir()
        assert trace.name == "rank-1.json.gz"
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        assert sum(event.get("name") == "aten::mm" for event in events) == 1


def test_an_interrupted_step_and_a_profiler_that_is_off_leave_no_trace(tmp_path):
    with pytest.raises(KeyError), maybe_profiler(True, 2, tmp_path, rank=0) as profiler:
        profiler.step()
        raise KeyError  # in step 2
    with maybe_profiler(False, 1, tmp_path, rank=0) as profiler:
        profiler.step()
    assert list(tmp_path.iterdir()) == []
