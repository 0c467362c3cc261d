"""A progress bar for long phases, shown only in a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bar(tqdm):
    """tqdm without its monitor thread, because forking a process with threads is not safe."""

    monitor_interval = 0


def progress(total: int, desc: str, unit: str, *, rank: int = 0) -> Bar:
    """Return a bar with the rate and the remaining time, as a context manager.

    `.update(n)` advances it. It is shown only on rank 0 and only if stdout is a terminal, and is
    removed when it is closed. Log lines are printed above it.

    Args:
        total: number of units.
        unit: name of the units, for example "tok" or "prompts".
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
