"""A second fault during recovery from a first loses nothing and repeats nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_rank import poison, when
from tiny_student import one_process_group
from tiny_world import World, assert_same_run, read_scalars, train
from torch import nn

from opd_titan.checkpoint import checkpointer
from opd_titan.checkpoint.checkpointer import Checkpointer
from opd_titan.checkpoint.steps import complete_steps
from opd_titan.distributed.heartbeat import Heartbeat


class Killed(Exception):
    """Stands for SIGKILL in a run in this process."""


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """Return `at(place, act)`, which calls `act` once when the next run enters that phase."""

    def arrange(place: str, act: Callable[[], None]) -> None:
        monkeypatch.undo()
        for name in ("set_phase", "beat"):
            monkeypatch.setattr(Heartbeat, name, getattr(Heartbeat, name))
        when(place, 0, act)

    return arrange


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def steps_of(argv: list[str]) -> list[int]:
    return complete_steps(Path(argv[3]) / "checkpoint")


def test_a_validation_that_was_stopped_is_made_once(world: World, at: Any) -> None:
    options = ["--checkpoint.interval", 3, "--validation.interval", 2, "--export.interval", 2]
    argv = world.argv("stopped-then-killed", *options)
    at("phase validate of step 2", terminate)
    assert train(argv) == 75 and steps_of(argv) == [2]
    at("phase rollout of step 3", kill)
    with pytest.raises(Killed):
        train(argv)
    assert train(argv) == 0
    assert list(read_scalars(Path(argv[3]))["validation/accuracy"]) == [0, 2, 4]  # each once
    assert train(world.argv("undisturbed", *options)) == 0
    assert_same_run(world.folder / "undisturbed", Path(argv[3]), 4)


def test_a_stop_saves_again_what_the_storage_refused_before(
    world: World, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = world.argv("refused", "--checkpoint.interval", 2, "--validation.enable", False)
    at("phase rollout of step 3", terminate)
    write, calls = checkpointer.write_slices, iter(range(100))

    def refused_once(*args: Any) -> Any:
        if next(calls) == 0:
            raise OSError("no space left")
        return write(*args)

    monkeypatch.setattr(checkpointer, "write_slices", refused_once)
    assert train(argv) == 75 and steps_of(argv) == [2]


def test_a_save_under_way_is_finished_when_the_run_gives_up(world: World, at: Any) -> None:
    options = ["--training.max_skipped_updates", 0, "--validation.enable", False]
    argv = world.argv("gives-up", *options, "--checkpoint.interval", 1)
    at("phase update of step 2", poison)
    assert train([*argv, "--checkpoint.async_mode", "async"]) == 1
    assert steps_of(argv) == [1]


def test_a_run_sent_back_twice_keeps_what_was_there_first(world: World, at: Any) -> None:
    argv = world.argv("sent-back", "--checkpoint.interval", 1, "--validation.enable", False)
    assert train(argv) == 0 and steps_of(argv) == [1, 2, 3, 4]
    folder = Path(argv[3]) / "checkpoint"
    first = (folder / "step-4" / "checksums.json").read_text()
    assert train([*argv, "--checkpoint.load_step", "3", "--optimizer.lr", "1e-3"]) == 0
    assert (folder / "step-4.old" / "checksums.json").read_text() == first
    assert train([*argv, "--checkpoint.load_step", "3"]) == 0
    assert (folder / "step-4.old" / "checksums.json").read_text() == first
    assert (folder / "step-4.old-2").is_dir()


def test_an_optimizer_that_has_not_moved_yet_is_saved_as_such(tmp_path: Path) -> None:
    """If all updates so far were skipped, the next one must count as the first."""
    with one_process_group():
        models = [nn.Linear(2, 1), nn.Linear(2, 1)]
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
        checkpointers = [
            Checkpointer(tmp_path, m, o, keep_latest_k=0, background=False)
            for m, o in zip(models, optimizers, strict=True)
        ]
        before = [p.clone() for p in models[0].parameters()]
        assert checkpointers[0].save(1, {})
        checkpointers[1].load(1)
        assert not optimizers[0].state and not optimizers[1].state
        for now, was, loaded in zip(
            models[0].parameters(), before, models[1].parameters(), strict=True
        ):
            assert torch.equal(now, was) and torch.equal(loaded, was)
