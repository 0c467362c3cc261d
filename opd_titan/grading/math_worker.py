"""The other process of `math_judge`: a JSON object a line in, one out. It ends with its input."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

_SECONDS = 60  # by the clock


def main() -> None:
    _limit_memory(int(sys.argv[1]))
    seconds = float(sys.argv[2])
    # A signal to the whole job (Ctrl-C, a scheduler's) is the job's matter: it closes the input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    from math_verify import LatexExtractionConfig, parse, verify

    strictly = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parsed(text: str, **options: Any) -> list[Any]:
        # Timeouts are kept by the process that waits for this one.
        return parse(text, parsing_timeout=None, **options)

    def reply(question: dict[str, str]) -> dict[str, Any]:
        gold_text = question["gold"]
        marked = "\\boxed" in gold_text or "$" in gold_text
        gold = parsed(gold_text if marked else f"\\boxed{{{gold_text}}}")
        if "boxed" in question:
            answer = parsed(f"\\boxed{{{question['boxed']}}}", extraction_config=strictly)
        else:
            answer = parsed(question["text"])
        if not answer:
            return {"correct": False, "extracted": None}
        return {
            "correct": bool(verify(gold, answer, timeout_seconds=None)),
            # Its last form is the text that was found.
            "extracted": str(answer[-1])[:1000],
        }

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # The kernel ends it, whatever code it is in, when it has worked too long; and by the clock,
        # should nobody be left to end it.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(_SECONDS)
        try:
            found = reply(json.loads(line))
        except (Exception, RecursionError):  # sympy raises almost every class there is
            found = {"correct": False, "extracted": None}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(json.dumps(found), file=replies, flush=True)


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > size:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
