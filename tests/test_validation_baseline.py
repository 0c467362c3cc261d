"""Validation against a teacher: its stop tokens, and its results when a run is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_world import (
    World,
    hf_greedy,
    load_hf,
    make_model,
    make_sums,
    make_world,
    read_log,
    read_scalars,
    train,
    write_rows,
)
from transformers import AutoTokenizer

from opd_titan.checkpoint.steps import complete_steps
from opd_titan.grading.answers import extract_answer

NEW_TOKENS = 24
GAPS = ("validation/gap_recovered", "validation/teacher_accuracy")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def warnings_in(log: str) -> list[str]:
    return [line for line in log.splitlines() if " WARNING " in line]


def teacher_with_its_own_end(world: World) -> list[Any]:
    """Make a teacher that stops at another token than the student, and questions for it.

    The gold answers are what the teacher says up to its own stop token. From there to the student's
    stop token other numbers follow.
    """
    model, tokenizer = load_hf(world.teacher), AutoTokenizer.from_pretrained(world.teacher)
    make_sums(world.folder / "many.jsonl", 30, seed=3)
    texts = {}
    for line in (world.folder / "many.jsonl").read_text().splitlines():
        question = json.loads(line)["question"]
        ids = tokenizer(f"<user>{question}<assistant>()")["input_ids"]
        texts[question] = hf_greedy(model, ids, NEW_TOKENS)

    def rows(end: int) -> list[dict[str, str]]:
        found = []
        for question, response in texts.items():
            cut = response[: response.index(end) + 1] if end in response else response
            own, students = (extract_answer(tokenizer.decode(r)) for r in (cut, response))
            if own is not None and own != students:
                found.append({"question": question, "answer": f"#### {own}"})
        return found

    end = max(range(2, len(tokenizer)), key=lambda token: len(rows(token)))
    assert len(rows(end)) >= 2
    write_rows(world.folder / "own-end.jsonl", rows(end)[:6])
    make_model(world.folder / "own-end", seed=2, eos_ids=[end])
    return ["--teacher.hf_path", world.folder / "own-end"]


@pytest.fixture(scope="module")
def validated(world: World) -> tuple[Path, list[Any]]:
    """Two steps, each validated against a teacher that is always right; and the options of it."""
    options = teacher_with_its_own_end(world)
    options += ["--validation.path", world.folder / "own-end.jsonl", "--training.steps", 2]
    options += ["--rollout.max_new_tokens", NEW_TOKENS, "--validation.interval", 1]
    options += ["--optimizer.lr", 1e-4]
    assert train(world.argv("validated", *options)) == 0
    return world.folder / "validated", options


@pytest.mark.slow
def test_validation_stops_the_teacher_at_its_own_tokens(validated: tuple[Path, list[Any]]) -> None:
    scalars = read_scalars(validated[0])
    assert scalars["validation/teacher_accuracy"] == {0: 1.0, 1: 1.0, 2: 1.0}
    assert scalars["validation/accuracy"][0] < 1.0
    assert list(scalars["validation/gap_recovered"]) == [0, 1, 2]


# ------------------------------------------------------------- a run that goes on


def go_on(world: World, validated: tuple[Path, list[Any]], name: str, *options: Any) -> str:
    """Resume a copy of the run for one more step, and return the new part of its log."""
    source, given = validated
    out = source.with_name(name)
    if not out.exists():
        shutil.copytree(source, out)
    before = read_log(out)
    steps = complete_steps(out / "checkpoint")[-1] + 1
    argv = world.argv(name, *given, "--checkpoint.interval", 1, "--training.steps", steps)
    argv.append("--checkpoint.allow_changes")
    assert train([*argv, *map(str, options)]) == 0
    log = read_log(out).removeprefix(before)
    assert "Resumed from" in log and f"next step {steps}" in log
    return log


@pytest.mark.parametrize(
    "options",
    [
        ["--validation.max_prompts", 3],
        ["--validation.temperature", 0.5],
        ["--validation.max_new_tokens", NEW_TOKENS - 1],
        ["--validation.path", "{}/data"],
        ["--teacher.hf_path", "{}/teacher"],
        ["--teacher.random_init"],
        ["--data.template", "raw"],
    ],
    ids=lambda options: options[0],
)
def test_baselines_of_another_validation_are_not_used(
    world: World, validated: tuple[Path, list[Any]], options: list[Any]
) -> None:
    options = [str(o).format(world.folder) for o in options]
    name = options[0].removeprefix("--")
    (warning,) = [w for w in warnings_in(go_on(world, validated, name, *options)) if "gap" in w]
    assert "changed since the checkpoint" in warning
    scalars = read_scalars(world.folder / name)
    assert list(scalars["validation/accuracy"]) == [0, 1, 2, 3]
    for gap in GAPS:
        assert list(scalars[gap]) == [0, 1, 2], gap


def test_there_is_no_gap_later_either(world: World, validated: tuple[Path, list[Any]]) -> None:
    options = ["--rollout.max_new_tokens", 8]  # the default of validation too
    assert "changed since" in go_on(world, validated, "later", *options)
    assert "changed since" not in go_on(world, validated, "later", *options)
    for gap in GAPS:
        assert list(read_scalars(world.folder / "later")[gap]) == [0, 1, 2], gap


def test_paths_and_the_interval_of_validation_may_change(
    world: World, validated: tuple[Path, list[Any]]
) -> None:
    shutil.copy(world.folder / "own-end.jsonl", world.folder / "moved.jsonl")
    shutil.copytree(world.folder / "own-end", world.folder / "moved")
    options = ["--validation.interval", 3, "--validation.path", world.folder / "moved.jsonl"]
    options += ["--teacher.hf_path", world.folder / "moved"]
    assert "changed since" not in go_on(world, validated, "interval", *options)
    for gap in GAPS:
        assert list(read_scalars(world.folder / "interval")[gap]) == [0, 1, 2, 3], gap


# --------------------------------------------------------------- held-out prompts


@pytest.mark.parametrize("shared", [0, 3])
def test_validation_on_training_prompts_is_named(world: World, shared: int) -> None:
    rows = [{"question": f"What is {n} - {n}?", "answer": "#### 0"} for n in range(20)]
    folder = world.folder / f"shared-{shared}"
    write_rows(folder / "train.jsonl", rows[:12])
    write_rows(folder / "test.jsonl", rows[12 - shared : 20 - shared])
    options = ["--data.path", folder, "--validation.max_prompts", 0, "--training.steps", 1]
    assert train(world.argv(f"held-out-{shared}", *options)) == 0
    found = warnings_in(read_log(world.folder / f"held-out-{shared}"))
    assert len(found) == (shared > 0)
    if found:
        assert f"Validation: {shared} of 8 prompts are training prompts too" in found[0]
