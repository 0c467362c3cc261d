"""A run that lasts: what it writes has bounds, and nothing of it grows in memory."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_world import World, make_world, read_rollouts, rollout_bytes, train

from opd_titan.observability import logging as run_logging
from opd_titan.observability.logging import init_logging
from opd_titan.observability.rollout_writer import OldRollouts

# ---- log files ----


@pytest.fixture
def _small_logs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Log files of 1,000 bytes, and the program's logger put back as it was."""
    monkeypatch.setattr(run_logging, "FILE_BYTES", 1000)
    logger = logging.getLogger("opd_titan")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    for handler in set(logger.handlers) - set(before[0]):
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.usefixtures("_small_logs")
def test_a_ranks_log_and_one_older_file_have_a_bound(tmp_path: Path) -> None:
    for start in (0, 300):  # the second start goes on in the same file
        logger = init_logging(tmp_path, 1)
        for number in range(start, start + 300):
            logger.debug("line %d", number)
    folder = tmp_path / "logs"
    assert sorted(p.name for p in folder.iterdir()) == ["rank-1.log", "rank-1.log.1"]
    assert all(0 < p.stat().st_size <= 1000 for p in folder.iterdir())
    text = (folder / "rank-1.log.1").read_text() + (folder / "rank-1.log").read_text()
    numbers = [int(line.split()[-1]) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 600)) and len(numbers) > 20


@pytest.mark.usefixtures("_small_logs")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_warns_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").symlink_to("/dev/full")
    logger = init_logging(tmp_path, 1)
    for number in range(3):
        logger.info("line %d", number)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("opd_titan: ") and "rank-1.log: lines are missing: No space" in line


# ---- rollouts ----


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "rollouts").iterdir()}


def files(*steps: int) -> set[str]:
    return {f"step-{step}.jsonl" for step in steps}


def put(folder: Path, *names_: str) -> None:
    (folder / "rollouts").mkdir(exist_ok=True)
    for name in names_:
        (folder / "rollouts" / name).write_text("{}\n")


def test_old_rollouts_go_and_nothing_else(tmp_path: Path) -> None:
    others = {
        "step-1.jsonl.tmp", "step-01.jsonl", "step--1.jsonl", "step-1.json", "my-step-1.jsonl",
        "step-1.jsonl.gz", "step-\u0661.jsonl", "notes.txt",
    }  # fmt: skip
    put(tmp_path, *others, *files(1, 2, 3, 7))
    (tmp_path / "rollouts" / "step-0.jsonl").mkdir()
    others.add("step-0.jsonl")
    old = OldRollouts(tmp_path / "rollouts", 2)
    put(tmp_path, *files(5))
    old.delete(5)  # the first one of a run clears all that is too old; a later step's file stays
    assert names(tmp_path) == others | files(5, 7)
    put(tmp_path, *files(6))
    old.delete(6)
    assert names(tmp_path) == others | files(5, 6, 7)
    put(tmp_path, *files(7))
    old.delete(7)
    assert names(tmp_path) == others | files(6, 7)


def test_0_keeps_all(tmp_path: Path) -> None:
    put(tmp_path, *files(1, 2, 3))
    OldRollouts(tmp_path / "rollouts", 0).delete(3)
    assert names(tmp_path) == files(1, 2, 3)
    OldRollouts(tmp_path / "none", 1).delete(3)  # a folder that somebody took away


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("endurance"))


def test_a_run_keeps_the_newest_rollouts_also_when_it_resumes_and_goes_back(world: World) -> None:
    out = world.folder / "out"
    common = ["--training.steps", 6, "--validation.enable", "false"]
    assert train(world.argv("out", *common, "--metrics.keep_rollouts", 3)) == 0
    assert names(out) == files(4, 5, 6)
    first = rollout_bytes(out)

    # Goes back: 3 to 6 are made again, each in the place of the old one.
    back = [*common, "--checkpoint.load_step", 2]
    put(out, "mine.jsonl")
    assert train(world.argv("out", *back, "--metrics.keep_rollouts", 3)) == 0
    assert names(out) == files(4, 5, 6) | {"mine.jsonl"}
    (out / "rollouts" / "mine.jsonl").unlink()
    assert rollout_bytes(out) == first

    # With fewer to keep, and none that a run before this one should have deleted.
    put(out, *files(1, 3))
    back = [*common, "--checkpoint.load_step", 4]
    assert train(world.argv("out", *back, "--metrics.keep_rollouts", 2)) == 0
    assert list(read_rollouts(out)) == [5, 6]


# ---- memory, file handles, threads ----


@pytest.fixture
def endurance(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark that watches long runs."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    return importlib.import_module("endurance")


def test_counts_show_leaks(endurance: ModuleType) -> None:
    over = threading.Event()
    endurance.count()  # it frees what other tests have left behind
    before = endurance.count()
    # Of 40 MiB each: the allocator takes more than 32 from the system, whatever is free already.
    held = [torch.ones(10 << 20) for _ in range(4)] + [torch.ones(1) for _ in range(14)]
    ends = os.pipe()
    threads = [threading.Thread(target=over.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    after = endurance.count()
    over.set()
    for end in ends:
        os.close(end)
    grown = {key: after[key] - before[key] for key in after}
    assert grown["files"] == 2 and grown["threads"] >= 3
    assert grown["resident, MiB"] > 80
    assert grown["tensors"] == len(held) and grown["objects"] >= len(held)


def test_slope_of_a_line_with_noise(endurance: ModuleType) -> None:
    steps = list(range(500, 2000))
    noise = torch.randn(len(steps), generator=torch.Generator().manual_seed(0)).tolist()
    found = endurance.slope(steps, [0.002 * x + n for x, n in zip(steps, noise, strict=True)])
    assert abs(found["per 1,000 steps"] - 2.0) < found["+-"] < 0.5


def calm(values: list[float]) -> tuple[float, float]:
    """The least of either half, so that what exists for a moment is in neither."""
    half = len(values) // 2
    return min(values[:half]), min(values[half:])


@pytest.mark.long
def test_150_steps_on_two_processes_leave_nothing_behind(repo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(repo / "benchmarks" / "endurance.py"), "--out", str(out)]
    command += ["--steps", "150", "--processes", "2", "--count", "3", "--objective", "reverse_kl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads((out / "endurance.json").read_text())
    assert "rank 0" in {row["of"] for row in report["slopes"]}
    for rank in ("rank 0", "rank 1"):
        # What is made once is made by then.
        counts = [c for c in report["samples"][rank] if c["step"] > 50]
        assert [c["step"] for c in counts] == list(range(51, 150, 3))
        for key, slack in {"tensors": 0, "objects": 100, "files": 0, "threads": 0}.items():
            before, after = calm([c[key] for c in counts])
            assert after <= before + slack, (rank, key)  # a leak has some every step
    assert names(out / "run") == files(*range(136, 151))
    assert len(list((out / "run" / "checkpoint").glob("step-*"))) == 2
