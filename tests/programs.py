"""Run programs as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def run_program(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with this checkout on Python's path; capture what it prints."""
    env = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run(
        command, env=env, capture_output=True, encoding="utf-8", timeout=600, check=False
    )


def run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    return run_program(sys.executable, *words, **environment)
