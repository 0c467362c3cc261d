"""The launch: exit codes, one line for the user's mistakes, and signals through torchrun."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_world import (
    TIMEOUT,
    World,
    assert_same_run,
    make_model,
    make_sums,
    make_world,
    own_output,
    read_log,
    script,
    train,
    train_on,
    write_rows,
)

from opd_titan.checkpoint.steps import complete_steps


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def finish(argv: list[str], processes: int) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and seconds of run_train.sh."""
    begin = time.monotonic()
    run = script(argv, processes)
    out, err = run.communicate(timeout=TIMEOUT)
    return run.returncode, out, err, time.monotonic() - begin


# ----------------------------------------------------------------- mistakes


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistyped_option_is_one_line_at_once(world: World, processes: int) -> None:
    code, out, err, seconds = finish(world.argv("typo", "--optimizer.lrr", 1), processes)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "--optimizer.lrr" in line and "optimizer.lr?" in line
    assert seconds < 15, "torch was imported, or worse"
    assert not (world.folder / "typo").exists()


def test_a_world_size_without_a_rank_is_not_a_world(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system may set the variable in every shell."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    options = ("--training.steps", 1, "--validation.enable", "false")
    assert train(world.argv("alone", *options)) == 0


def test_help_comes_once_whatever_the_number_of_processes(world: World) -> None:
    code, out, err, _ = finish(world.argv("help", "--help"), 2)
    assert (code, err) == (0, "")
    assert out.count("usage: ") == 1 and "--rollout.group_size" in out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_missing_model_is_one_line_whatever_the_number_of_processes(
    world: World, processes: int
) -> None:
    argv = world.argv("missing", "--student.hf_path", world.folder / "nowhere")
    code, out, err, _ = finish(argv, processes)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("opd_titan: student.hf_path = ") and "nowhere" in line
    assert own_output(out) == ""
    assert not (world.folder / "missing").exists()


def other_tokens(folder: Path) -> list[Any]:
    make_model(folder / "other", seed=2, extra=("\t",))
    return ["--teacher.hf_path", folder / "other"]


def fewer_tokens(folder: Path) -> list[Any]:
    make_model(folder / "student-extra", seed=1, extra=("\t",))
    return ["--student.hf_path", folder / "student-extra"]


def fewer_rows(folder: Path) -> list[Any]:
    """A vocabulary may be padded, but not cut."""
    make_model(folder / "short", seed=2, vocab_size=97)
    return ["--teacher.hf_path", folder / "short"]


def other_reference(folder: Path) -> list[Any]:
    make_model(folder / "other", seed=2, extra=("\t",))
    return ["--reference.coef", 0.5, "--reference.hf_path", folder / "other"]


def no_chat(folder: Path) -> list[Any]:
    make_model(folder / "plain", seed=1, chat=False)
    return ["--student.hf_path", folder / "plain"]


def cut_weights(folder: Path) -> list[Any]:
    make_model(folder / "cut", seed=2)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return ["--teacher.hf_path", folder / "cut"]


def bad_row(folder: Path) -> list[Any]:
    make_sums(folder / "bad.jsonl", 8, seed=1)
    with (folder / "bad.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What is 1+1?"}) + "\n")
    return ["--data.path", folder / "bad.jsonl"]


def nothing_to_grade(folder: Path) -> list[Any]:
    write_rows(folder / "prompts.jsonl", [{"prompt": "Say hello."}])
    return ["--validation.dataset", "prompts", "--validation.path", folder / "prompts.jsonl"]


MISTAKES: list[tuple[Callable[[Path], list[Any]], list[str]]] = [
    (other_tokens, ["student.hf_path and teacher.hf_path", "only in the teacher", r"'\t' = "]),
    (fewer_tokens, ["student.hf_path and teacher.hf_path", "only in the student", r"'\t' = 98"]),
    (fewer_rows, ["teacher.hf_path: ", "highest token id is 97", "vocab_size is 97"]),
    (other_reference, ["reference.hf_path", "vocabularies differ"]),
    (no_chat, ['data.template = "chat"', "no chat template", 'data.template = "raw"']),
    (cut_weights, ["cut/model.safetensors", "truncated"]),
    (bad_row, ["data.path", "bad.jsonl, line 9", "answer"]),
    (nothing_to_grade, ["validation", "without an answer to grade"]),
    (lambda _: ["--rollout.prompts_per_step", 23], ["rollout.prompts_per_step = 23", "22 prompts"]),
    (lambda _: ["--data.path", "/nowhere/at.jsonl"], ["data.path", "/nowhere/at.jsonl"]),
    (lambda _: ["--data.max_prompt_tokens", 5], ["data.max_prompt_tokens = 5", "shortest has 31"]),
    (
        lambda _: ["--parallelism.data_parallel_replicate_degree", 2],
        ["data_parallel_replicate_degree 2", "world size 1"],
    ),
    (lambda _: ["--checkpoint.load_step", 3], ["checkpoint.load_step", "complete steps: none"]),
]


@pytest.mark.parametrize(("mistake", "parts"), MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    mistake: Callable[[Path], list[Any]],
    parts: list[str],
) -> None:
    options = mistake(tmp_path)
    capfd.readouterr()
    assert train(world.argv("mistake", *options)) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("opd_titan: ") and len(line) < 700
    for part in parts:
        assert part in line
    assert own_output(out) == ""
    assert not (world.folder / "mistake").exists()


# ------------------------------------------------------------------ signals


@pytest.mark.slow
def test_sigterm_through_torchrun_ends_in_a_checkpoint_and_exit_code_75(world: World) -> None:
    options = ["--training.steps", 300, "--checkpoint.interval", 100, "--validation.enable=False"]
    out = world.folder / "stopped"
    run = script(world.argv("stopped", *options), processes=2)
    deadline = time.monotonic() + TIMEOUT
    while not (out / "rollouts" / "step-5.jsonl").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 75, err
    assert "Traceback" not in err
    (stopped_at,) = complete_steps(out / "checkpoint")
    assert 5 <= stopped_at < 100
    for rank in (0, 1):
        assert f"Stopped by signal 15 after step {stopped_at}" in read_log(out, rank)
    # It goes on, here for two steps more, as a run does that never stopped.
    options[1] = stopped_at + 2
    train_on(2, [world.argv(name, *options) for name in ("stopped", "whole")])
    assert f"next step {stopped_at + 1}" in read_log(out)
    assert_same_run(world.folder / "whole", out, stopped_at + 2)
