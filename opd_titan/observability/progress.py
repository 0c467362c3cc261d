"""A progress bar inside long phases, for people at a terminal; silent everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


class Bar(tqdm):
    """tqdm without its monitor thread (threads and forked data workers do not mix)."""

    monitor_interval = 0


def progress(work: Iterable | int | None, desc: str, unit: str = "it", *, rank: int = 0) -> Bar:
    """A bar with the rate and the time left, as an iterator and a context manager.

    Shown on rank 0 and only when stdout is a terminal; elsewhere it writes not one byte. It
    leaves no line behind. It shares stdout with the console log, which moves it aside to print.

    Args:
        work: an iterable to walk through, or the number of units that `.update(n)` will add up
            to, or None when the total is unknown.
        unit: what is counted, for example "tok" or "prompts".
    """
    iterable, total = (None, work) if isinstance(work, int) or work is None else (work, None)
    return Bar(
        iterable,
        desc=desc,
        total=total,
        unit=f" {unit}",
        unit_scale=True,
        file=sys.stdout,
        disable=rank != 0 or not sys.stdout.isatty(),
        leave=False,
        dynamic_ncols=True,
        miniters=1,
    )
