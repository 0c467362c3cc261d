"""Validation of a model with known answers; the self-check on equal and on unequal weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_rollout import CPU, EOS, Script, follow, prompts, requests, sharded, tiny

from opd_titan.data.types import Prompt
from opd_titan.distributed.world import ALONE, World, build_world, init_world
from opd_titan.evaluation.metrics import HeldOut
from opd_titan.evaluation.statistics import wilson
from opd_titan.evaluation.validator import VALIDATION_STREAM, Validator
from opd_titan.grading.graders import GRADERS
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.training.self_check import TOLERANCE, probe, report


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A world of one process."""
    init_world(60)
    yield build_world(CPU)
    dist.destroy_process_group()


# ------------------------------------------------------------------------ validation

ENDS = (10, 30, 50, 70)  # far apart: no response reaches another prompt's end


def one_that_fails_on(*ends: int) -> Generator:
    """Answers n - 1 to a prompt that ends with n, and 0 if n is in `ends`."""
    return Generator(Script(successors=dict.fromkeys(ends, 0)), {0})


def new_validator() -> Validator:
    held_out = [Prompt(i, "", (n,), answer=str(n - 1)) for i, n in enumerate(ENDS)]
    params = SamplingParams(16, temperature=0.0)
    sets = [HeldOut("", held_out, GRADERS["auto"])]
    return Validator(sets, 1, params, 42, lambda ids: f"The answer is {ids[0]}.", ALONE)


def test_accuracy_and_gap(world: World) -> None:
    validator = new_validator()
    validator.measure_teacher(one_that_fails_on(70))
    start = validator.measure_student(one_that_fails_on(10, 30, 50), step=0)
    low, high = wilson(0.25, 4)
    assert start == {
        "validation/accuracy": 0.25,
        "validation/accuracy_low": low,
        "validation/accuracy_high": high,
        "validation/response_tokens_mean": (1 + 1 + 1 + 16) / 4,
        "validation/teacher_accuracy": 0.75,
        "validation/gap_recovered": 0.0,
    }
    for failures, gap in [((10, 30), 0.5), ((10,), 1.0), ((), 1.5), (ENDS, -0.5)]:
        scalars = validator.measure_student(one_that_fails_on(*failures), step=5)
        assert scalars["validation/accuracy"] == 1 - len(failures) / 4
        assert scalars["validation/gap_recovered"] == gap
        assert scalars["validation/teacher_accuracy"] == 0.75
    assert scalars["validation/response_tokens_mean"] == 1.0


def test_no_gap_without_a_better_teacher(world: World) -> None:
    validator = new_validator()
    scalars = validator.measure_student(one_that_fails_on(10), step=0)
    assert set(scalars) == {
        "validation/accuracy",
        "validation/accuracy_low",
        "validation/accuracy_high",
        "validation/response_tokens_mean",
    }
    for failures in [(10,), (10, 30)]:  # a teacher as good as the start, and a worse one
        validator.measure_teacher(one_that_fails_on(*failures))
        scalars = validator.measure_student(one_that_fails_on(), step=3)
        assert scalars["validation/teacher_accuracy"] == 1 - len(failures) / 4
        assert "validation/gap_recovered" not in scalars


def test_accuracy_is_the_mean_over_samples_of_a_fixed_stream(world: World) -> None:
    params, model = SamplingParams(4, temperature=1.0), tiny()
    stream = (42, VALIDATION_STREAM)
    drawn = Generator(model, EOS).generate(requests(prompts(), 5, stream), params)
    first = {s.prompt.index: str(s.response_ids[0]) for s in drawn if s.sample_index == 0}
    right = sum(str(s.response_ids[0]) == first[s.prompt.index] for s in drawn)
    assert 12 < right < 60
    held_out = [replace(p, answer=first[p.index]) for p in prompts()]
    sets = [HeldOut("", held_out, GRADERS["auto"])]
    validator = Validator(sets, 5, params, 42, lambda ids: f"#### {ids[0]}", ALONE)
    for step in (0, 5):  # the same random numbers each time
        scalars = validator.measure_student(Generator(model, EOS, 7), step)
        assert scalars["validation/accuracy"] == right / 60


@pytest.mark.parametrize("grader", ["auto", "gsm8k", "exact", "choice"])
def test_thinking_that_the_prompt_opened_must_be_closed(world: World, grader: str) -> None:
    """Qwen3-Thinking's template opens it; the response then has no `<think>` of its own."""
    texts = {"": 1.0, "<think>\n\n</think>\n\n": 1.0, "<think>\n": 0.0}
    answer = "A" if grader == "choice" else "9"
    for end, right in texts.items():
        for closed in ("", "Perhaps 5.</think>"):
            said = closed + ("#### " if grader == "gsm8k" else "") + answer
            held_out = [Prompt(0, f"assistant\n{end}", (10,), answer=answer)]
            sets = [HeldOut("", held_out, GRADERS[grader])]
            params = SamplingParams(2, temperature=0.0)
            validator = Validator(sets, 1, params, 42, lambda ids, said=said: said, ALONE)
            scalars = validator.measure_student(one_that_fails_on(), step=0)
            assert scalars["validation/accuracy"] == (1.0 if closed else right), (end, closed)


# ------------------------------------------------------------------------ self-check


def warnings_of(result: dict[str, float]) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("opd_titan").addHandler(handler)
    try:
        report(result, torch.float32)
    finally:
        logging.getLogger("opd_titan").removeHandler(handler)
    return messages


def test_a_number_that_is_too_large_or_none_is_a_warning() -> None:
    fine = {"kl": -1e-7, "gap": 1e-5}
    assert warnings_of(fine) == []
    for bad in ({"kl": 0.1}, {"kl": -0.1}, {"kl": math.nan}, {"gap": 0.1}, {"gap": math.nan}):
        assert len(warnings_of({**fine, **bad})) == 1, bad


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}], ids=str)
def test_the_probe_finds_no_difference_between_equal_weights(
    world: World, options: dict[str, Any]
) -> None:
    source = sharded(world)
    params = SamplingParams(20, **options)
    result = probe(source, Generator(follow(source).model, EOS), prompts(), params, 0, world)
    assert abs(result["kl"]) <= 1e-6 and result["gap"] <= 1e-4
    assert warnings_of(result) == []


@pytest.mark.parametrize(
    "name", ["tok_embeddings.weight", "layers.1.attention.wk.weight", "norm.weight"]
)
def test_the_probe_finds_one_stale_weight(world: World, name: str) -> None:
    source, stale = sharded(world), tiny()
    stale.get_parameter(name).add_(0.1)
    generator = Generator(stale, EOS)
    result = probe(source, generator, prompts(), SamplingParams(20), 0, world)
    assert abs(result["kl"]) <= 1e-6 and result["gap"] > 10 * TOLERANCE[torch.float32]
    (message,) = warnings_of(result)
    assert "rollout" in message
