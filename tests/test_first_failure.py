"""The launcher reports the rank that failed first, not those that it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from programs import run_python
from tiny_world import REPO, TIMEOUT

from opd_titan.cli.launch import _first


def failure(code: int, at: int = 0, **data: Any) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, timestamp=at, error_file_data=data)


LOST = failure(1, 30, message="another rank did not answer", follows=True)


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        # The agent kills who does not hear its SIGTERM; what they all waited for is another's.
        ([failure(-9, 30), failure(1, 0, message="no space")], 1),
        ([failure(-9, 0), failure(75, 30)], 1),
        ([failure(-15, 0), failure(2, 0, message="no such file")], 1),
        ([failure(-9, 30), failure(-11, 30)], 1),
        ([failure(-9, 30), failure(1, 0, message="lost a node", follows=True)], 1),
        ([failure(-9, 30), failure(-6, 0)], 1),
        ([failure(-15, 0), failure(-9, 31)], 0),
        # For want of memory, the system does; and the agent then ends who does not notice.
        ([LOST, failure(-9, 30)], 1),
        ([failure(-6, 30), failure(-9, 29)], 1),
        ([failure(-9, 30), failure(-9, 0)], 1),
        ([LOST, failure(1, 40)], 1),  # a bug, with its traceback
        ([failure(-15, 0), LOST], 1),
    ],
)
def test_the_launcher_tells_what_the_others_follow_from(
    failures: list[SimpleNamespace], first: int
) -> None:
    assert _first(dict(enumerate(failures)))[0] == first


RANKS = """
import os, signal, sys, time
from opd_titan.errors import LostOthers
from opd_titan.cli.exits import _report
if os.environ["RANK"] == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that cannot reach bytecode
    time.sleep(120)
time.sleep(1)  # until it is deaf
if sys.argv[1] == "lost":
    _report(LostOthers("another rank did not answer"))
    os._exit(1)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(int(sys.argv[1]))
"""
ENDS = {
    "75": (75, []),
    "3": (1, ["opd_titan: rank 0 failed with exit code 3"]),
    "lost": (1, ["opd_titan: rank 0: another rank did not answer"]),
    "killed": (137, ["opd_titan: rank 0 was ended by SIGKILL"]),
}


@pytest.mark.long
def test_a_rank_that_the_agent_has_to_kill_hides_nothing(tmp_path: Path) -> None:
    """Run all at once, because the agent waits 30 s in each."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "opd_titan.cli.launch", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    runs = {
        how: subprocess.Popen(
            [*command, str(tmp_path / "ranks.py"), how],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ENDS
    }
    for how, (code, lines) in ENDS.items():
        _, stderr = runs[how].communicate(timeout=TIMEOUT)
        said = [line for line in stderr.splitlines() if line.startswith("opd_titan: ")]
        assert (how, runs[how].returncode, said) == (how, code, lines), stderr


NO_SPACE = """
import resource, sys
from opd_titan.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # bytes: half a report
sys.exit(main(["--optimizer.lrr", "1"]))
"""


@pytest.mark.parametrize("folder", [".", "absent"])
def test_a_mistake_is_told_where_the_launcher_cannot_be_told(tmp_path: Path, folder: str) -> None:
    report = tmp_path / folder / "error.json"
    done = run_python("-c", NO_SPACE, TORCHELASTIC_ERROR_FILE=str(report))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("opd_titan: ") and "lrr" in line
    assert not report.exists()  # the launcher cannot parse half a report
