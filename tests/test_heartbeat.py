"""A process that hangs ends itself, even if its log cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import REPO, run_python

SETUP = """
import ctypes, logging, os, sys, time
from opd_titan.distributed.heartbeat import Heartbeat
logger = logging.getLogger("opd_titan")
line = Heartbeat(0, 1.0)
line.set_phase("the test")
"""
HANGS = {
    "a full disk under the log": """
logger.addHandler(logging.FileHandler("/dev/full"))
time.sleep(60)
""",
    "a log whose file system hangs": """
read, write = os.pipe()
os.set_blocking(write, False)
try:
    while os.write(write, bytes(65536)):
        pass
except BlockingIOError:
    os.set_blocking(write, True)
handler = logging.FileHandler("/dev/null")
handler.stream = os.fdopen(write, "w")
logger.addHandler(handler)
time.sleep(60)
""",
    "no stderr": """
os.close(2)
time.sleep(60)
""",
    "the log's lock": """
handler = logging.FileHandler("/dev/null")
logger.addHandler(handler)
handler.acquire()
time.sleep(60)
""",
    "a library that keeps the interpreter": """
ctypes.PyDLL(None).sleep(60)
""",
}


def start(script: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", SETUP + script]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_process_that_stands_still_ends() -> None:
    processes = {hang: start(script) for hang, script in HANGS.items()}
    for hang, process in processes.items():
        _, stderr = process.communicate(timeout=50)
        assert process.returncode == 1, hang
        if hang not in ("no stderr", "a library that keeps the interpreter"):
            said = "opd_titan: rank 0 has not moved for 1 s in the test; ended"
            assert said in stderr, hang


@pytest.mark.slow
def test_a_process_that_was_suspended_goes_on() -> None:
    script = """
print("up", file=sys.stderr, flush=True)
until = time.monotonic() + 6
while time.monotonic() < until:
    time.sleep(0.3)
    line.beat()
line.close()
"""
    process = start(script)
    assert process.stderr is not None and process.stderr.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=50) == 0


def test_a_note_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    note = str(tmp_path / "absent")
    assert run_python("-c", SETUP + "line.close()", OPD_TITAN_PHASES=note).returncode == 0
