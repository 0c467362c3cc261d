"""A process that reaches its memory limit says so in one line."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from programs import run_program
from tiny_world import REPO, World, make_model, make_world

from opd_titan.config import JobConfig
from opd_titan.config.resolve import resolve
from opd_titan.training.out_of_memory import is_out_of_memory, remedies

# Logits of some tokens are larger than what is left by then.
WIDE = {"vocab_size": 400_000}
# malloc gives back at once what is freed: earlier phases leave nothing to live on.
PLAIN = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "GLIBC_TUNABLES": ""}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("memory"))
    for seed, folder in enumerate((world.student, world.teacher)):
        make_model(folder, seed, **WIDE)
    return world


def starved(world: World, place: str, ranks: int = 1) -> tuple[int, list[str]]:
    """Return exit code and messages; the last rank gets no more memory after `place`."""
    options = ["--validation.enable", "false", "--checkpoint.enable", "false"]
    options += ["--rollout.group_size", "8"]
    command = [sys.executable, str(REPO / "tests" / "faulty_rank.py")]
    if ranks > 1:
        command[1:1] = ["-m", "opd_titan.cli.launch", "--nproc-per-node", str(ranks)]
        command[-1:-1] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    wrong = [str(ranks - 1), place, "0", "memory"]
    done = run_program(*command, *wrong, *world.argv("out", *options), **PLAIN)
    assert "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("opd_titan: ")]
    return done.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "ranks", "option", "parts"),
    [
        pytest.param(
            *("phase rollout of step 1", 1, "lower rollout.max_concurrent (now 0, what fits)", ()),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("phase teacher of step 1", 1, "lower training.max_tokens_per_microbatch", ()),
            marks=pytest.mark.long,
        ),
        ("phase update of step 2", 2, "raise activation_checkpoint.mode", ("optimizer state",)),
    ],
)
def test_it_is_one_line_with_the_phase_the_parts_and_the_options(
    world: World, place: str, ranks: int, option: str, parts: tuple[str, ...]
) -> None:
    code, said = starved(world, place, ranks)
    (line,) = said
    who = "rank 1: " if ranks > 1 else ""
    assert code == 1 and line.startswith(f"opd_titan: {who}out of memory in {place}; in use, GiB: ")
    assert option in line and "or take more ranks" in line
    found = dict(re.findall(r"([a-z][a-z' ]*) (\d+\.\d\d)", line.partition("GiB: ")[2]))
    assert {"student weights", "teacher weights", "activations and the rest", *parts} <= set(found)
    weights = 400_000 * 32 * 4 / 2**30
    for name in ("student weights", "teacher weights"):
        assert float(found[name]) == pytest.approx(weights / ranks, abs=0.01)
    for name in parts:
        assert float(found[name]) == pytest.approx(2 * weights / ranks, abs=0.01)


def test_what_counts_as_running_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(MemoryError) as python:
        bytearray(1 << 60)
    assert is_out_of_memory(python.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(other.value)


def test_what_is_set_already_is_not_recommended() -> None:
    config, phase = JobConfig(), "phase update of step 3"
    assert remedies(phase, resolve(config, "cuda", 1))[-2:] == [
        "set teacher.cpu_offload or optimizer.cpu_offload",
        "or take more ranks",
    ]
    config.activation_checkpoint.mode = "full"
    config.teacher.cpu_offload = config.optimizer.cpu_offload = True
    assert len(remedies(phase, resolve(config, "cuda", 1))) == 2
    job = resolve(config, "cpu", 1)
    assert remedies("the loading of the teacher", job) == ["or take more ranks"]
