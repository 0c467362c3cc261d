"""A progress bar for long phases, shown at a terminal only."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bar(tqdm):
    """tqdm without its monitor thread: threads and forked data workers do not mix."""

    monitor_interval = 0


def progress(total: int, desc: str, unit: str, *, rank: int = 0) -> Bar:
    """Return a bar with the rate and the time left, as a context manager; `.update(n)` moves it.

    It is shown on rank 0 and only if stdout is a terminal; otherwise nothing is written. It leaves
    no line behind, and the console log moves it out of the way to print.

    Args:
        total: number of units.
        unit: what is counted, for example "tok" or "prompts".
    """
    return Bar(
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
