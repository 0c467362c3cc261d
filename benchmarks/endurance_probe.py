"""Counts what lives inside a run of `opd_titan.train`; `benchmarks/endurance.py` switches it on.

It changes nothing in the program: an audit hook notices that rank 0 begins a step's file of
rollouts, which is always at the same point of a step, and counts there.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
from collections import Counter
from typing import Any

FILE = "OPD_ENDURANCE_PROBE"  # where the counts go, one JSON object a line
EVERY = "OPD_ENDURANCE_EVERY"  # steps between two

_STEP = re.compile(r"rollouts/step-(\d+)\.jsonl\.tmp$")


class _Mallinfo2(ctypes.Structure):
    """glibc's malloc, all arenas together, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks "
        "keepcost".split()
    ]


def malloc_bytes() -> dict[str, int]:
    """In use, free but kept, and mapped one by one; empty where malloc does not tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return {}
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return {
        "malloc_used": info.uordblks,
        "malloc_free": info.fordblks,
        "malloc_mapped": info.hblkhd,
    }


def count() -> dict[str, Any]:
    """Objects that the collector knows, after it ran; tensors among them; types by number."""
    gc.collect()
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    kinds = Counter(type(thing) for thing in gc.get_objects())
    return {
        "objects": sum(kinds.values()),
        "tensors": sum(n for kind, n in kinds.items() if issubclass(kind, tensor)),
        "kinds": {f"{k.__module__}.{k.__qualname__}": n for k, n in kinds.most_common(300)},
        **malloc_bytes(),
    }


def install() -> None:
    """Count in this process if it is rank 0 of the program."""
    words = getattr(sys, "orig_argv", sys.argv)
    if FILE not in os.environ or "opd_titan.train" not in words or "opd_titan.cli.launch" in words:
        return
    if os.environ.get("RANK", "0") != "0":
        return
    every = int(os.environ[EVERY])
    file = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        found = _STEP.search(str(arguments[0]))
        if found and int(found[1]) % every == 0:
            os.write(file, (json.dumps({"step": int(found[1]), **count()}) + "\n").encode())

    sys.addaudithook(audit)
