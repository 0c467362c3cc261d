"""A run goes on in another world than its checkpoint was made in, and is the run that stayed.

Elsewhere: `test_train` goes from 2 x FSDP to 1 process; `test_layouts` from 2 x 2 (FSDP x TP) to
1 process and to 2 x TP. Here: from 2 processes to 4, to another split of the same 2 (FSDP to TP and
back), to copies (HSDP), and from 2 over 4 to 1; over the end of an epoch, with several updates a
step in the order of the prompts.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import (
    World,
    make_world,
    read_log,
    read_rollouts,
    read_scalars,
    read_weights,
    train,
    train_on,
)

pytestmark = pytest.mark.long  # worlds of four processes

# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
Degrees = tuple[int, int, int]
ONE, FSDP, TP = (1, 1, 1), (1, 2, 1), (1, 1, 2)
FSDP_4, FSDP_TP, HSDP_TP = (1, 4, 1), (1, 2, 2), (2, 1, 2)

LAST = 8
# 22 prompts, 4 a step: the sixth step starts the second epoch.
# A window of 3 steps in TensorBoard, so that checkpoints hold half-filled ones.
OPTIONS = """
    --distill.minibatches 2 --reference.coef 0.5 --validation.interval 4 --metrics.log_freq 3
    --optimizer.eps 1e-4 --checkpoint.interval 2
""".split()
# From a checkpoint of step 4 (before the epoch ends) to the end; by name, where it came from.
ON_TWO: dict[str, tuple[str, Degrees]] = {"fsdp": ("fsdp", TP), "tp": ("tp", FSDP)}
ON_FOUR: dict[str, tuple[str, Degrees]] = {
    "fsdp-to-4": ("fsdp", FSDP_4),
    "fsdp-to-fsdp-tp": ("fsdp", FSDP_TP),
    "tp-to-hsdp-tp": ("tp", HSDP_TP),
}
RUNS = {**ON_TWO, **ON_FOUR}


def job(world: World, out: str, degrees: Degrees) -> list[str]:
    names = ("data_parallel_replicate_degree", "data_parallel_shard_degree")
    names += ("tensor_parallel_degree",)
    layout: list[Any] = []
    for name, degree in zip(names, degrees, strict=True):
        layout += [f"--parallelism.{name}", degree]
    return world.argv(out, *OPTIONS, "--training.steps", LAST, *layout)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def copy_at(world: World, source: str, name: str, step: int) -> None:
    """The run `source` as it was after this step, which is one of its checkpoints."""
    out = world.folder / name
    shutil.copytree(world.folder / source, out, ignore=shutil.ignore_patterns("hf", "logs"))
    for path in [*(out / "checkpoint").iterdir(), *(out / "rollouts").iterdir()]:
        number = path.name.removeprefix("step-").removesuffix(".jsonl")
        if not number.isdigit() or int(number) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Undisturbed on one process; on two, then from step 4 on another two, on four, on one."""
    assert train(job(world, "truth", ONE)) == 0
    back = ["--checkpoint.load_step", "4"]
    train_on(
        2,
        [job(world, "fsdp", FSDP), job(world, "tp", TP)]
        + [[*job(world, name, degrees), *back] for name, (_, degrees) in ON_TWO.items()],
    )
    for name, (source, _) in ON_FOUR.items():
        copy_at(world, source, name, 4)
    train_on(4, [job(world, name, degrees) for name, (_, degrees) in ON_FOUR.items()])
    copy_at(world, "fsdp-to-fsdp-tp", "to-one", 6)
    assert train(job(world, "to-one", ONE)) == 0
    return world


def assert_the_run_that_stayed(truth: Path, out: Path) -> None:
    """The same prompts in the same order, the same tokens, and numbers to fp32 rounding."""
    theirs, ours = read_rollouts(truth), read_rollouts(out)
    assert list(ours) == list(theirs) == list(range(1, LAST + 1))
    for step, rows in theirs.items():
        for row, mine in zip(rows, ours[step], strict=True):
            for key, value in row.items():
                if key.endswith("logprobs") or key == "advantages":
                    assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (step, key)
                else:
                    assert mine[key] == value, (step, key)
    expected, scalars = (read_scalars(folder, measured=False) for folder in (truth, out))
    assert scalars.keys() == expected.keys() >= {"loss/policy", "validation/accuracy", "grad_norm"}
    # Rounding itself, and what is measured on some of each rank's tokens.
    probed = {"kl/reverse", "kl/forward", "policy/logprob_gap_max"}
    probed |= {name for name in expected if name.startswith("policy/t")}
    for name in expected.keys() - probed:
        assert scalars[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    weights, mine = (read_weights(folder, LAST) for folder in (truth, out))
    assert weights.keys() == mine.keys()
    for name, weight in weights.items():
        assert torch.linalg.norm(mine[name] - weight) <= 1e-4 * torch.linalg.norm(weight), name


@pytest.mark.parametrize("name", RUNS)
def test_it_goes_on_in_another_world(runs: World, name: str) -> None:
    out, (_, degrees) = runs.folder / name, RUNS[name]
    log = read_log(out)
    assert f"Resumed from {out / 'checkpoint'}/step-4" in log
    worlds = [line.split("World: ")[1].split()[0] for line in log.splitlines() if "World: " in line]
    assert worlds[-1] == str(math.prod(degrees))
    assert_the_run_that_stayed(runs.folder / "truth", out)


def test_from_two_over_four_to_one(runs: World) -> None:
    out = runs.folder / "to-one"
    assert f"Resumed from {out / 'checkpoint'}/step-6" in read_log(out)
    assert_the_run_that_stayed(runs.folder / "truth", out)


def test_the_runs_show_what_they_are_to_show(runs: World) -> None:
    truth = runs.folder / "truth"
    rows = read_rollouts(truth)
    order = [row["prompt_index"] for step in rows for row in rows[step][::2]]
    # Five steps an epoch; the two prompts that are left over wait for the next one.
    epochs = [order[:20], order[20:]]
    assert len(set(epochs[0])) == 20 and epochs[1] != epochs[0][:12]
    assert len(set(epochs[1])) == 12
    state = json.loads((truth / "checkpoint" / "step-4" / "train_state.json").read_text())
    assert state["recorder"]["window"]["loss/policy"], "a half-filled window is to be carried over"
    values = read_scalars(truth)["policy/clip_fraction"].values()
    assert max(values) > 0
