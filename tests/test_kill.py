"""Jobs that are killed and started again end like undisturbed jobs, bit for bit.

The long form, which kills in every phase: `python tests/kill_anywhere.py --kills 50 --out ...`.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from kill_anywhere import Aim, Harness, kill_anywhere, report
from same_run import differences, leftovers
from tiny_world import make_world, train


@pytest.mark.slow
def test_killed_twice_it_is_the_same_run(tmp_path: Path) -> None:
    """In an update while a checkpoint may be being written, and before one gets its name."""
    harness = Harness(make_world(tmp_path), 1, tmp_path / "scratch", random.Random(0))
    harness.options = ("--training.steps", 7)
    assert train(harness.argv("truth", "async")) == 0
    plan = [Aim("update", 4, 0.05), Aim("rename:checkpoint", 2)]
    assert harness.disturb("async", "killed", 2, plan) == 2
    harness.problems += differences(tmp_path / "truth", tmp_path / "killed")
    assert harness.problems == []
    assert harness.landed["before rename:checkpoint/step-N.tmp"] == 1


@pytest.mark.long
def test_killed_eight_times_on_two_processes(tmp_path: Path) -> None:
    harness = kill_anywhere(tmp_path / "out", 8, processes=2, seed=1, variants=("sync",))
    report(harness, 8)
    assert harness.problems == []


def test_differences_are_found(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    options = ("--training.steps", 2, "--checkpoint.interval", 1, "--validation.enable", False)
    truth, other = tmp_path / "truth", tmp_path / "other"
    assert train(world.argv("truth", *options)) == 0
    assert train(world.argv("other", *options)) == 0
    assert differences(truth, other) == []
    (other / "checkpoint" / "step-9.tmp").mkdir()
    assert leftovers(other) == ["checkpoint/step-9.tmp"]
    shutil.rmtree(other / "checkpoint" / "step-1")
    with (other / "rollouts" / "step-2.jsonl").open("a") as file:
        file.write("\n")
    weights = other / "hf" / "step-2" / "model.safetensors"
    *before, last = weights.read_bytes()
    weights.write_bytes(bytes([*before, last ^ 1]))
    # The scalars of another run.
    assert train(world.argv("more", *options, "--training.seed", 7)) == 0
    shutil.rmtree(other / "tb")
    shutil.copytree(tmp_path / "more" / "tb", other / "tb")
    found = "\n".join(differences(truth, other))
    for part in (
        "left over: checkpoint/step-9.tmp", "checkpoint: no step-1", "step-2.jsonl differs",
        "hf/step-2/model.safetensors differs", "scalar loss/policy: other values at steps [1, 2]",
    ):  # fmt: skip
        assert part in found
