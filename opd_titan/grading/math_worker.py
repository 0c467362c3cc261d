"""The process in which `MathJudge` compares answers: one JSON message in, one out."""

from __future__ import annotations

import json
import resource
import signal
import sys
from multiprocessing.connection import Connection

MEMORY = 4 << 30  # bytes of address space


def main() -> None:
    """Answer the questions that come over the file descriptor in argv until it is closed."""
    connection, seconds = Connection(int(sys.argv[1])), float(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A signal to all processes of the job (Ctrl-C, a scheduler's) is for the trainer, which closes
    # the connection when it ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    import math_verify  # noqa: F401  slow: imported before the first question

    connection.send_bytes(b"ready")
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # When the time is up, the kernel ends this process, whatever code it is in.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = compare(**question)
        except (Exception, RecursionError):  # sympy raises errors of many classes
            reply = (False, None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(reply).encode())


def compare(gold: str, text: str, boxed: bool) -> tuple[bool, str | None]:
    """Return whether the answer in a text equals the gold answer, and the answer as text.

    Args:
        boxed: whether the text is the content of a box; else the answer is its last expression.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # The caller and `main` limit the time; the library's own limits would use signals.
    marked = "\\boxed" in gold or "$" in gold
    wanted = parse(gold if marked else f"\\boxed{{{gold}}}", parsing_timeout=None)
    if boxed:
        only_box = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
        found = parse(f"\\boxed{{{text}}}", extraction_config=only_box, parsing_timeout=None)
    else:
        found = parse(text, parsing_timeout=None)
    if not found:
        return False, None
    # The last form that the library returns is the text it found.
    return bool(verify(wanted, found, timeout_seconds=None)), str(found[-1])[:1000]


if __name__ == "__main__":
    main()
