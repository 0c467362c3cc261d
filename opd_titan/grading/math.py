"""Whether two mathematical answers are equal, through math-verify, whatever a model has written.

An expression may take forever to simplify, or all memory (`9^{9^{9^9}}`), inside code that no
Python signal can interrupt. So answers are compared in a process of their own, which has limited
memory and is ended and started anew when it takes too long; what cannot be compared is wrong.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import re
import selectors
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd_titan.errors import ConfigError, Fault
from opd_titan.grading.answers import normalize_number

logger = logging.getLogger("opd_titan")

# For one comparison, of the processor's time: how busy the machine is must not change a grade.
SECONDS = 5.0
_PATIENCE = 10  # times that, by the clock
_SECONDS_TO_START = 120.0  # on a busy machine with a slow file system
MEMORY = 4 << 30  # bytes of address space
# An answer is short. Of a text without a box the end is looked at, where the answer is.
LONGEST_ANSWER, LONGEST_TEXT = 1000, 4000
_SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")


class MathJudge:
    """Starts the other process when it is first needed, and keeps it.

    Attributes:
        seconds: of the processor's time that one comparison may take.
        gave_up: comparisons that took too long or ended the process.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self.gave_up = seconds, 0
        self._process: subprocess.Popen[bytes] | None = None

    def require(self, where: str) -> None:
        """Raise ConfigError, naming the key `where`, unless math-verify is installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                f"{where}: this grader needs math-verify, which is not installed; install the "
                "extra: pip install 'opd_titan[math]'"
            )

    def compare_boxed(self, boxed: str, gold: str) -> tuple[bool, str]:
        """Whether the content of a `\\boxed{}` is the gold answer; and that content."""
        if _same_text(boxed, gold) or _same_number(boxed, gold):
            return True, boxed
        if len(boxed) > max(LONGEST_ANSWER, 4 * len(gold)):
            return False, boxed
        return bool(self._ask(boxed=boxed, gold=gold)["correct"]), boxed

    def compare_text(self, text: str, gold: str) -> tuple[bool, str | None]:
        """Whether the final expression of a text is the gold answer; and that expression."""
        reply = self._ask(text=text[-LONGEST_TEXT:], gold=gold)
        return bool(reply["correct"]), reply["extracted"]

    def _ask(self, **question: str) -> dict[str, Any]:
        wrong = {"correct": False, "extracted": None}
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, _PATIENCE * self.seconds)
        except OSError:
            line = b""
        if line:
            return json.loads(line)
        self.close()
        self.gave_up += 1
        if self.gave_up in (1, 10, 100, 1000, 10000):
            logger.warning(
                "Grading: %s answers could not be compared within %s s and %s GiB, and count as "
                "wrong; the last was %.200r",
                self.gave_up,
                self.seconds,
                MEMORY >> 30,
                question.get("boxed") or question.get("text"),
            )
        return wrong

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # One thread, no GPU: it must not take from the run what the run needs.
        settings = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "opd_titan.grading.math_worker", str(MEMORY), str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **settings},
        )
        if not _read_line(process, _SECONDS_TO_START):
            code = process.poll()
            self.close()
            raise Fault(f"math-verify does not start in a process of its own (exit code {code})")
        return process

    def close(self) -> None:
        """End the other process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(OSError):
                process.kill()
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout)):
                with suppress(OSError):
                    stream.close()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line of the answer; empty if it does not come in time, or never will."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        # A line is written at once, so that what has begun to come is all there.
        return process.stdout.readline() if selector.select(seconds) else b""


def _same_text(a: str, b: str) -> bool:
    """Spaces aside, but not those between two numbers or words: 3 1/2 is not 31/2."""
    return _SPACES.sub("", a.strip()) == _SPACES.sub("", b.strip())


def _same_number(a: str, b: str) -> bool:
    """As `grading` reads numbers: with units and full stops that math-verify stumbles over."""
    if "=" in a and "=" in b:  # of what, perhaps
        return False
    number = normalize_number(a)
    return number is not None and number == normalize_number(b)


math_judge = MathJudge()
atexit.register(math_judge.close)
