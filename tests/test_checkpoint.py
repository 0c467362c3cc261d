"""Exact resume: a run that was stopped, killed or sent back ends as the one that never was."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_student import one_process_group
from tiny_world import (
    TIMEOUT,
    World,
    assert_same_run,
    make_model,
    make_world,
    read_log,
    read_scalars,
    rollout_bytes,
    start,
    train,
)
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opd_titan.checkpoint.checkpointer import Checkpointer, choose_step, complete_steps
from opd_titan.errors import CheckpointError

# Everything that has a state or a schedule; 22 prompts, so that the sixth step starts an epoch.
OPTIONS = """
    --training.steps 6 --distill.minibatches 2 --reference.coef 0.5 --validation.interval 3
    --lr_scheduler.warmup_steps 1 --lr_scheduler.decay cosine --metrics.log_freq 2
""".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """Six steps without a stop; checkpoints 2, 4 and 6."""
    assert train(world.argv("whole", *OPTIONS)) == 0
    return world.folder / "whole"


def copy_run(source: Path, name: str, *, keep: tuple[int, ...]) -> Path:
    """A copy of a run's folder as a crash leaves it: these checkpoints, no export."""
    target = source.with_name(name)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("hf"))
    for folder in (target / "checkpoint").iterdir():
        if folder.name not in [f"step-{n}" for n in keep]:
            shutil.rmtree(folder)
    return target


def tensors(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Everything DCP saved, flattened."""
    dcp_to_torch_save(checkpoint, scratch)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                walk(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = value

    walk("", torch.load(scratch, weights_only=False))
    return flat


# ------------------------------------------------------------------- resume


def test_resume_from_the_newest_is_the_run_that_never_stopped(world: World, whole: Path) -> None:
    out = copy_run(whole, "newest", keep=(2,))
    log = read_log(out)
    assert train(world.argv("newest", *OPTIONS)) == 0
    assert_same_run(whole, out, 6)
    # The steps of times and memory are the same too: no gap, no step twice.
    steps = {name: list(values) for name, values in read_scalars(whole).items()}
    assert {name: list(values) for name, values in read_scalars(out).items()} == steps
    new = read_log(out).removeprefix(log)
    resumed = [line for line in new.splitlines() if "Resumed" in line]
    assert len(resumed) == 1
    assert f"{out}/checkpoint/step-2 (the newest complete checkpoint)" in resumed[0]


def test_load_step_goes_back_and_sets_newer_checkpoints_aside(world: World, whole: Path) -> None:
    out = copy_run(whole, "back", keep=(2, 4, 6))
    assert train(world.argv("back", *OPTIONS, "--checkpoint.load_step", 2)) == 0
    assert_same_run(whole, out, 6)
    found = sorted(p.name for p in (out / "checkpoint").iterdir())
    assert found == ["step-2", "step-4", "step-4.old", "step-6", "step-6.old"]
    log = read_log(out)
    assert "step-2 (checkpoint.load_step)" in log
    assert "Set aside as step-N.old" in log


def test_load_step_0_starts_afresh_and_keeps_its_own_checkpoints(world: World, whole: Path) -> None:
    out = copy_run(whole, "afresh", keep=(4, 6))
    options = [*OPTIONS, "--training.steps", 3, "--lr_scheduler.decay", "constant"]
    options += ["--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 2]
    assert train(world.argv("afresh", *options, "--checkpoint.load_step", 0)) == 0
    assert complete_steps(out / "checkpoint") == [2, 3]
    assert "Starting at step 1: checkpoint.load_step is 0" in read_log(out)
    assert max(read_scalars(out)["loss/total"]) == 3
    # The next start goes on from this run and not from the one that it replaced.
    options[options.index("--training.steps", 12) + 1] = 4
    assert train(world.argv("afresh", *options)) == 0
    assert complete_steps(out / "checkpoint") == [3, 4]


def test_a_finished_run_stays_as_it_is(world: World, whole: Path) -> None:
    out = copy_run(whole, "finished", keep=(2, 4, 6))
    assert train(world.argv("finished", *OPTIONS)) == 0
    assert complete_steps(out / "checkpoint") == [2, 4, 6]
    assert rollout_bytes(out) == rollout_bytes(whole)
    assert read_scalars(out) == read_scalars(whole)


def test_async_mode_writes_the_same_checkpoints(world: World, whole: Path, tmp_path: Path) -> None:
    assert train(world.argv("async", *OPTIONS, "--checkpoint.async_mode", "async")) == 0
    out = world.folder / "async"
    assert_same_run(whole, out, 6)
    assert complete_steps(out / "checkpoint") == [2, 4, 6]
    for step in (2, 6):
        folders = (run / "checkpoint" / f"step-{step}" for run in (whole, out))
        a, b = (tensors(folder, tmp_path / "all.pt") for folder in folders)
        assert a.keys() == b.keys() and len(a) > 60
        for name, value in a.items():
            same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
            assert same, name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_or_stopped_in_the_middle(world: World, number: signal.Signals) -> None:
    options = ["--training.steps", 40, "--checkpoint.interval", 4, "--validation.interval", 0]
    options += ["--checkpoint.keep_latest_k", 1]
    reference, out = world.folder / "long", world.folder / number.name
    if not reference.exists():
        assert train(world.argv("long", *options)) == 0
    run = start(world.argv(number.name, *options))
    deadline = time.monotonic() + TIMEOUT
    while not complete_steps(out / "checkpoint"):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(number)
    code = run.wait(TIMEOUT)
    stopped_at = complete_steps(out / "checkpoint")[-1]
    assert stopped_at < 40
    if number == signal.SIGTERM:
        assert code == 75
        steps = [int(p.stem.removeprefix("step-")) for p in (out / "rollouts").iterdir()]
        assert stopped_at == max(steps), "the checkpoint must be of the last step that was done"
        assert "Stopped by signal 15" in read_log(out)
    else:
        assert code == -number
    assert train(world.argv(number.name, *options)) == 0
    assert f"next step {stopped_at + 1}" in read_log(out)
    assert_same_run(reference, out, 40)


# ------------------------------------------------------- what is not resumed


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        (path,) = checkpoint.glob(name)
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        (None, ["--checkpoint.load_step", 5], ["step-5 is not a complete", "steps: 2, 4, 6"]),
        (None, ["--student.hf_path", "{}/deep"], ["another model", "layers.2.", "absent there"]),
        (None, ["--student.hf_path", "{}/wide"], ["another model", "[98, 32] there and [98, 16]"]),
        (None, ["--training.seed", 7], ["training.seed is 7 but was 42"]),
        (damage("*.distcp", lambda b: b[:500]), [], ["step-6: cannot be read", "load_step"]),
        (damage(".metadata", lambda b: b[:500]), [], ["step-6: cannot be read", "load_step"]),
        (damage("train_state.json", lambda b: b[:5]), [], ["step-6: cannot be read"]),
    ],
)
def test_what_cannot_be_resumed_is_one_line_and_exit_code_2(
    world: World,
    whole: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
    options: list[Any],
    parts: list[str],
) -> None:
    for name, sizes in (("deep", {"num_hidden_layers": 3}), ("wide", {"hidden_size": 16})):
        if not (world.folder / name).exists():
            make_model(world.folder / name, seed=3, **sizes)
    shutil.rmtree(world.folder / "refused", ignore_errors=True)
    out = copy_run(whole, "refused", keep=(2, 4, 6))
    if change is not None:
        change(out / "checkpoint" / "step-6")
    capfd.readouterr()
    options = [str(o).format(world.folder) for o in options]
    assert train(world.argv("refused", *OPTIONS, *options)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("opd_titan: ") and len(line) < 600
    for part in parts:
        assert part in line
    assert complete_steps(out / "checkpoint") == [2, 4, 6]
    assert rollout_bytes(out) == rollout_bytes(whole)


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    def leave(name: str, *files: str) -> None:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")

    assert choose_step(tmp_path / "absent", -1) is None
    leave("step-2", ".metadata", "train_state.json")
    leave("step-10", ".metadata", "train_state.json")
    leave("step-12.tmp", ".metadata", "train_state.json")  # killed before the rename
    leave("step-14", ".metadata")  # copied in part
    leave("step-16.old", ".metadata", "train_state.json")
    (tmp_path / "step-18").write_text("")
    assert complete_steps(tmp_path) == [2, 10]
    assert choose_step(tmp_path, -1) == 10
    assert choose_step(tmp_path, 2) == 2
    assert choose_step(tmp_path, 0) is None
    for step in (12, 14, 16, 3):
        with pytest.raises(CheckpointError, match=r"complete steps: 2, 10$"):
            choose_step(tmp_path, step)


# ------------------------------------------------------------ the checkpointer


@pytest.fixture
def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(1500, 1500)  # large enough for a write to take a while
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1500)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("background", [False, True])
def test_what_changes_after_a_save_is_not_in_it(
    tmp_path: Path, model_and_optimizer: tuple[nn.Module, torch.optim.Optimizer], background: bool
) -> None:
    model, optimizer = model_and_optimizer
    with one_process_group():
        checkpointer = Checkpointer(
            tmp_path, model, optimizer, keep_latest_k=0, background=background
        )
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        state = {"step": 1, "list": [1.5]}
        checkpointer.save(1, state)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
                optimizer.state[p]["exp_avg"].fill_(7.0)
        state["list"].append(7.0)
        checkpointer.wait()
        assert checkpointer.load(1) == {"step": 1, "list": [1.5]}
        torch.testing.assert_close(
            [model.state_dict(), optimizer.state_dict()], saved, rtol=0, atol=0
        )


def test_a_background_save_is_incomplete_until_it_is_polled(
    tmp_path: Path, model_and_optimizer: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    with one_process_group():
        checkpointer = Checkpointer(
            tmp_path, *model_and_optimizer, keep_latest_k=2, background=True
        )
        for step in (1, 2, 3):
            checkpointer.save(step, {"step": step})
            assert step not in checkpointer.steps()
            deadline = time.monotonic() + 60
            while step not in checkpointer.steps():
                assert time.monotonic() < deadline
                checkpointer.poll()
        assert checkpointer.steps() == [2, 3]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-3"]
        assert json.loads((tmp_path / "step-3" / "train_state.json").read_text()) == {"step": 3}
    assert not dist.is_initialized()
