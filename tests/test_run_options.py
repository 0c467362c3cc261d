"""Runs without checkpoints, with random weights, and with models of few positions."""

from __future__ import annotations

import signal
import time

import pytest
from test_bad_input import refused
from tiny_world import (
    TIMEOUT,
    World,
    make_model,
    read_log,
    read_scalars,
    rollout_bytes,
    start,
    train,
    write_rows,
)

NO_VALIDATION = ["--validation.enable", "False"]


@pytest.mark.slow
def test_a_stop_without_checkpoints_fails_and_says_so(world: World) -> None:
    options = ["--checkpoint.enable", "False", "--training.steps", 5000, *NO_VALIDATION]
    run, out = start(world.argv("unsaved", *options)), world.folder / "unsaved"
    deadline = time.monotonic() + TIMEOUT
    while not (out / "rollouts" / "step-2.jsonl").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait(TIMEOUT) == 1
    log = read_log(out).splitlines()
    (warning,) = [line for line in log if " WARNING " in line and "Stopped" in line]
    assert "signal 15" in warning and "nothing was saved" in warning
    assert "checkpoint.enable is false" in warning
    assert not (out / "checkpoint").exists() and not (out / "hf").exists()


# Every prompt of the tiny world has 31 tokens.
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_sequences_longer_than_a_models_positions_are_refused(
    world: World, capfd: pytest.CaptureFixture[str], role: str
) -> None:
    make_model(world.folder / f"short-{role}", seed=3, max_position_embeddings=43)
    model = [f"--{role}.hf_path", world.folder / f"short-{role}", "--training.steps", 1]
    longer = ["--rollout.max_new_tokens", 13, *NO_VALIDATION]
    line = refused(world.argv("long", *model, *longer), capfd)
    for part in ("rollout.max_new_tokens", "31 tokens", "13", "43", f"short-{role}"):
        assert part in line
    # Held-out prompts and their answers count too.
    line = refused(world.argv("long", *model, "--validation.max_new_tokens", 13), capfd)
    assert "validation.max_new_tokens" in line and "13" in line
    question = {"question": "What is 10+2?", "answer": "#### 12"}
    write_rows(world.folder / "longer.jsonl", [question])
    line = refused(
        world.argv("long", *model, "--validation.path", world.folder / "longer.jsonl"), capfd
    )
    assert "32 tokens" in line and "43" in line
    assert not (world.folder / "long").exists()
    # The longest that fit are accepted, and a validation that is off needs nothing.
    fits = ["--rollout.max_new_tokens", 12, *NO_VALIDATION, "--validation.max_new_tokens", 13]
    assert train(world.argv(f"fits-{role}", *model, *fits)) == 0


def test_a_random_teacher_is_another_model_and_the_reference_is_the_student(world: World) -> None:
    options = ["--student.random_init", "--teacher.random_init", "--training.steps", 1]
    options += ["--teacher.hf_path", world.student, "--reference.coef", 0.5, *NO_VALIDATION]
    for name in ("random", "random-again"):
        assert train(world.argv(name, *options)) == 0
    out = world.folder / "random"
    scalars = read_scalars(out)
    assert scalars["kl/student_teacher"][1] > 0.01
    assert scalars["kl/student_reference"][1] == pytest.approx(0, abs=1e-5)
    assert read_log(out).count("RANDOM weights") == 3
    assert rollout_bytes(out) == rollout_bytes(world.folder / "random-again")
