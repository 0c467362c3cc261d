"""Signals in the middle of a step, numbers that are not finite, ranks that die or stand still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faulty_rank import when
from tiny_student import one_process_group
from tiny_world import (
    REPO,
    TIMEOUT,
    World,
    assert_same_run,
    make_world,
    read_log,
    read_rows,
    read_scalars,
    read_weights,
    train,
    train_on,
)

from opd_titan.checkpoint.steps import complete_steps
from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.distributed.stopping import SIGNALS, Stopped, StopRequest

# One is after an export, a validation, and before a checkpoint.
OPTIONS = ["--checkpoint.interval", 3, "--rollout.max_concurrent", 8]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    assert train(world.argv("undisturbed", *OPTIONS)) == 0
    return world.folder / "undisturbed"


# ----------------------------------------------------------- stopped inside a step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("phase", "beats", "saved"),
    [
        ("data", 0, 1),
        ("rollout", 3, 1),
        ("teacher", 1, 1),
        ("update", 1, 1),  # of two micro-batches: nothing has moved
        ("validate", 2, 2),  # the step is done, what follows it is not
    ],
)
def test_a_signal_is_heard_inside_every_phase(
    world: World,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    phase: str,
    beats: int,
    saved: int,
) -> None:
    argv = world.argv(f"{phase}-{number.name}", *OPTIONS)
    argv += ["--training.max_tokens_per_microbatch", "120"] if phase == "update" else []
    with monkeypatch.context() as patch:
        for name in ("set_phase", "beat"):
            patch.setattr(Heartbeat, name, getattr(Heartbeat, name))  # put back at the end
        when(f"phase {phase} of step 2", beats, lambda: os.kill(os.getpid(), number))
        assert train(argv) == 75
    out = Path(argv[3])
    assert complete_steps(out / "checkpoint") == [saved]
    assert list(read_scalars(out)["loss/policy"]) == list(range(1, saved + 1))
    assert f"Stopped by signal {number} after step {saved} with" in read_log(out)
    assert train(argv) == 0
    if phase == "update":
        # Other micro-batches than the undisturbed run's: the same to rounding.
        scalars = read_scalars(out, measured=False)
        for name, values in read_scalars(undisturbed, measured=False).items():
            assert scalars[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    else:
        assert_same_run(undisturbed, out, 4)


@pytest.mark.slow
def test_no_signal_stops_between_the_updates_of_a_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = world.argv("minibatches", *OPTIONS, "--distill.minibatches", 4)
    with monkeypatch.context() as patch:
        for name in ("set_phase", "beat"):
            patch.setattr(Heartbeat, name, getattr(Heartbeat, name))
        when("phase update of step 2", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(argv) == 75
    assert complete_steps(Path(argv[3]) / "checkpoint") == [2]  # done to its end
    assert train(argv) == 0
    assert train(world.argv("minibatches-whole", *OPTIONS, "--distill.minibatches", 4)) == 0
    assert_same_run(world.folder / "minibatches-whole", Path(argv[3]), 4)


def test_a_signal_that_comes_during_a_vote_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    all_reduce = dist.all_reduce

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        all_reduce(*args, **kwargs)

    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        with one_process_group():
            stop = StopRequest()
            with monkeypatch.context() as patch:
                patch.setattr(dist, "all_reduce", interrupted)
                stop.check()  # the vote had begun
            with pytest.raises(Stopped):
                stop.check()
            assert stop.signal == signal.SIGTERM
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


# -------------------------------------------------------------- two ranks


def launch(argv: list[str], rank: int, place: str, beats: int, what: str) -> tuple[int, str]:
    """Exit code and stderr of two ranks, one of which goes wrong."""
    command = [sys.executable, "-m", "opd_titan.cli.launch", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(REPO / "tests" / "faulty_rank.py"), str(rank), place, str(beats), what]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *argv], env=env, capture_output=True, text=True, timeout=TIMEOUT
    )
    return done.returncode, done.stderr


def opd_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("opd_titan: ")]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(world: World) -> None:
    options: list[Any] = [*OPTIONS, "--training.deterministic", "true"]
    argv, place = world.argv("one-told", *options), "phase rollout of step 2"
    code, stderr = launch(argv, 1, place, 2, "SIGTERM")
    assert code == 75 and "Traceback" not in stderr, stderr
    out = world.folder / "one-told"
    assert complete_steps(out / "checkpoint") == [1]
    whole = world.argv("none-told", *options)
    train_on(2, [argv, whole])
    assert_same_run(world.folder / "none-told", out, 4)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(world: World) -> None:
    argv = world.argv("killed", *OPTIONS)
    code, stderr = launch(argv, 1, "phase update of step 2", 0, "SIGKILL")
    assert code == 128 + signal.SIGKILL
    assert "opd_titan: rank 1 was ended by SIGKILL in phase update of step 2" in opd_lines(stderr)
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_ended(world: World) -> None:
    argv = world.argv("hangs", *OPTIONS, "--comm.train_timeout_seconds", 8)
    code, stderr = launch(argv, 1, "phase rollout of step 2", 1, "hang")
    assert code == 1
    said = "opd_titan: rank 1 has not moved for"
    (line,) = (line for line in opd_lines(stderr) if line.startswith(said))
    assert line.endswith("s in phase rollout of step 2; ended (comm.train_timeout_seconds)")
    assert "Traceback" not in stderr
    assert "faulty_rank.py" in read_log(world.folder / "hangs", rank=1)  # where it stood


@pytest.mark.slow
def test_one_ranks_nan_skips_the_update_on_both(world: World) -> None:
    options = ["--export.interval", 1, "--training.max_skipped_updates", 1]
    argv = world.argv("nan", *options)
    code, stderr = launch(argv, 1, "phase update of step 2", 0, "nan")
    assert code == 0, stderr
    out = world.folder / "nan"
    assert read_scalars(out)["skipped_updates"] == {1: 0, 2: 1, 3: 0, 4: 0}
    first, second, third = (read_weights(out, step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    assert [p.name for p in (out / "nonfinite").iterdir()] == ["rank-1"]
    ((step, (row,)),) = read_rows(out / "nonfinite" / "rank-1").items()
    assert step == 2 and row["teacher_logprobs"][0] is None
    for rank in (0, 1):
        assert "1 of 1 updates skipped" in read_log(out, rank)


@pytest.mark.long
def test_too_many_skipped_updates_end_the_run(world: World) -> None:
    argv = world.argv("nan-ends", *OPTIONS, "--training.max_skipped_updates", 0)
    code, stderr = launch(argv, 1, "phase update of step 2", 0, "nan")
    (line,) = opd_lines(stderr)
    assert code == 1 and "Traceback" not in stderr
    assert ": step 2: 1 updates in a row had a loss or a gradient" in line
    assert str(world.folder / "nan-ends" / "nonfinite") in line
