"""The launch: exit codes, one line for the user's mistakes, and signals through torchrun."""

from __future__ import annotations

import signal
import time

import pytest
from tiny_world import (
    TIMEOUT,
    World,
    read_log,
    script,
    train,
)

from opd_titan.checkpoint.steps import complete_steps


def finish(argv: list[str], processes: int) -> tuple[int, str, str, float]:
    """Return exit code, stdout, stderr and seconds of run_train.sh."""
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
