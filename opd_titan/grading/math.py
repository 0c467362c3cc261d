"""Compare mathematical answers with math-verify, safely for any text that a model may write.

An expression such as `9^{9^{9^9}}` takes forever to simplify, or all memory, in code that no Python
signal can interrupt. Answers are therefore compared in a separate process with limits of memory and
time. The kernel ends the process when it exceeds a limit; the answer then counts as wrong, and the
next comparison starts a new process.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from opd_titan.errors import Fault
from opd_titan.grading.math_worker import MEMORY
from opd_titan.grading.numbers import parse_number

logger = logging.getLogger("opd_titan")

SECONDS = 5.0  # processor time of one comparison, so that a busy machine changes no grade
_PATIENCE = 10  # the limit by the clock, in multiples of the processor time
_SECONDS_TO_START = 120.0  # on a busy machine with a slow file system
# An answer is short. In a text without a box it is at the end.
LONGEST_ANSWER, LONGEST_TEXT = 1000, 4000
_SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")


class MathJudge:
    """Compare answers in a separate process, which the first comparison starts.

    Args:
        seconds: processor time that one comparison may take.

    Attributes:
        gave_up: number of comparisons that took too long or ended the process.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self.gave_up = seconds, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def equals(self, boxed: str, gold: str) -> bool:
        """Return whether the content of a `\\boxed{}` equals the gold answer."""
        if _same_text(boxed, gold) or _same_number(boxed, gold):
            return True
        if len(boxed) > max(LONGEST_ANSWER, 4 * len(gold)):
            return False
        return self._ask(boxed, gold, boxed=True)[0]

    def find(self, text: str, gold: str) -> tuple[bool, str | None]:
        """Return whether the last expression of a text equals the gold answer, and that expression.

        The expression is None if the text has none, or if the comparison was given up.
        """
        return self._ask(text[-LONGEST_TEXT:], gold, boxed=False)

    def close(self) -> None:
        """End the separate process if there is one."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _ask(self, text: str, gold: str, boxed: bool) -> tuple[bool, str | None]:
        connection = self._connection or self._start()
        question = json.dumps({"text": text, "gold": gold, "boxed": boxed})
        try:
            connection.send_bytes(question.encode())
            if connection.poll(_PATIENCE * self.seconds):
                correct, extracted = json.loads(connection.recv_bytes())
                return correct, extracted
        except (EOFError, OSError):  # the process has ended
            pass
        self.close()
        self.gave_up += 1
        if self.gave_up in (1, 10, 100, 1000, 10000):
            logger.warning(
                "Grading: %s answers could not be compared within %s s and %s GiB and count as "
                "wrong; the last one is %.200r",
                self.gave_up,
                self.seconds,
                MEMORY >> 30,
                text,
            )
        return False, None

    def _start(self) -> Connection:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._connection, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(self.seconds)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opd_titan.grading.math_worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        connection = self._connection
        try:
            ready = connection.poll(_SECONDS_TO_START) and connection.recv_bytes()
        except (EOFError, OSError):
            ready = b""
        if not ready:
            self.close()
            raise Fault(
                "math-verify does not start in a separate process: try `import math_verify`"
            )
        return connection


def _same_text(a: str, b: str) -> bool:
    """Return whether two texts are equal. Only spaces between words or numbers count (3 1/2)."""
    return _SPACES.sub("", a.strip()) == _SPACES.sub("", b.strip())


def _same_number(a: str, b: str) -> bool:
    """Return whether two texts are one number; units and full stops confuse math-verify.

    Two equations are left to math-verify.
    """
    if "=" in a and "=" in b:
        return False
    number = parse_number(a)
    return number is not None and number == parse_number(b)


math_judge = MathJudge()
atexit.register(math_judge.close)
