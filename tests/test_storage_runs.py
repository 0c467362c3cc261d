"""Whole runs on storage that fails or was damaged: nothing is lost, and the exit code is right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import World, assert_same_run, make_world, read_log, read_weights, train

from opd_titan.checkpoint.steps import complete_steps

OPTIONS = ["--validation.interval", 0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """Four steps without a fault; checkpoints and exports 2 and 4."""
    assert run(world, "whole") == 0
    return world.folder / "whole"


def run(world: World, name: str, *options: Any) -> int:
    return train(world.argv(name, *OPTIONS, "--export.interval", 2, *options))


def copy_run(whole: Path, name: str) -> Path:
    target = whole.with_name(name)
    shutil.copytree(whole, target)
    return target


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    world: World, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = copy_run(whole, "damaged")
    flip(out / "checkpoint" / "step-4" / "rank-0.safetensors")
    assert run(world, "damaged") == 0
    printed = capfd.readouterr().out
    assert "warning: Damaged checkpoint: " in printed
    assert "step-4/rank-0.safetensors: its bytes" in printed
    assert "step-2 (the newest" in read_log(out)
    assert_same_run(whole, out, 4)
    found = sorted(path.name for path in (out / "checkpoint").iterdir())
    assert found == ["step-2", "step-4", "step-4.damaged"]


def test_without_an_intact_checkpoint_no_new_run_starts(
    world: World, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = copy_run(whole, "none")
    shutil.rmtree(out / "checkpoint" / "step-2")
    step = out / "checkpoint" / "step-4"
    flip(step / "train_state.json")
    before = sorted(out.rglob("*"))
    capfd.readouterr()
    assert run(world, "none") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{step}/train_state.json: " in line and "checkpoint.load_step = 0" in line
    assert sorted(out.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_what_storage_refuses_is_tried_again(
    world: World, whole: Path, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    """A file in the way of a folder fails for the superuser too."""
    options = ["--checkpoint.async_mode", mode]
    out = world.folder / f"refused-{mode}"
    blocks = [out / kind / f"step-{n}.tmp" for kind in ("checkpoint", "hf") for n in (2, 4)]
    for block in blocks:
        block.parent.mkdir(parents=True, exist_ok=True)
        block.write_text("")
    # The last save fails: the run must not look complete.
    assert run(world, out.name, *options) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "checkpoint of step 4 not saved: " in line and "step-4.tmp: File exists" in line
    log = read_log(out)
    assert log.count("ERROR Storage: checkpoint of step 2 not saved") == 1
    assert log.count("ERROR Storage: export ") == 2 and "Done" not in log
    assert "has checkpoint/ and hf/, but no run of this program wrote there before" in log
    assert complete_steps(out / "checkpoint") == []
    # Only the export fails: the checkpoint is complete, the run is not.
    for block in blocks[:2]:
        block.unlink()
    shutil.rmtree(out / "tb")
    shutil.rmtree(out / "rollouts")
    assert run(world, out.name, *options) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "hf/step-4 not written: " in line
    assert complete_steps(out / "checkpoint") == [2, 4]
    # A restart writes the export, although there is no step left to do.
    for block in blocks[2:]:
        block.unlink()
    assert run(world, out.name, *options) == 0
    assert_same_run(whole, out, 4)
    assert read_log(out).count("wrote there before") == 1


def test_a_failed_export_is_made_again_where_an_older_run_left_one(
    world: World, whole: Path
) -> None:
    out = copy_run(whole, "onto")
    older = read_weights(whole, 4)
    (out / "hf" / "step-9.tmp").mkdir()  # left by a killed run
    block = out / "hf" / "step-4.tmp"
    block.write_text("")
    options = ["--optimizer.lr", 1e-3]

    def is_older() -> bool:
        return all(torch.equal(older[name], now) for name, now in read_weights(out, 4).items())

    assert run(world, out.name, *options, "--checkpoint.load_step", 0) == 1
    assert is_older() and not (out / "hf" / "step-9.tmp").exists()
    block.unlink()
    assert run(world, out.name, *options) == 0
    assert not is_older()


def test_a_flipped_bit_in_a_students_weights_is_refused(
    world: World, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "exported"
    shutil.copytree(whole / "hf" / "step-4", folder)
    weights = folder / "model.safetensors"
    flip(weights)
    for role in ("student", "teacher"):
        assert run(world, "never", f"--{role}.hf_path", folder) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{weights}: its bytes are not those that were written" in line
    assert not (world.folder / "never").exists()
