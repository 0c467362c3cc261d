"""Chrome traces of whole training steps, one file per rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.profiler import ProfilerAction, profile

from opd_titan.errors import reason

logger = logging.getLogger("opd_titan")


@contextmanager
def maybe_profiler(
    enable: bool, interval: int, dump_folder: Path, rank: int, *, start_step: int = 0
) -> Iterator[Any]:
    """Yield a profiler; its `.step()` is called at the end of each training step.

    Each step that is a multiple of `interval` is written to
    `<dump_folder>/profile/step-N/rank-R.json.gz` (open it in ui.perfetto.dev or chrome://tracing).
    The step before it warms up the profiler. A step that an error or a signal interrupts has no
    trace.

    Args:
        start_step: the last completed step, 0 for a new run.
    """
    if not enable:
        yield SimpleNamespace(step=lambda: None)
        return
    interrupted = False

    def schedule(steps_done: int) -> ProfilerAction:
        steps_before = -(start_step + steps_done + 1) % interval
        if steps_before == 0:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if steps_before == 1 else ProfilerAction.NONE

    def save(profiler: profile) -> None:
        if interrupted:
            return
        folder = Path(dump_folder) / "profile" / f"step-{start_step + profiler.step_num}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"rank-{rank}.json.gz"))
        except OSError as error:  # a missing trace must not stop the run
            logger.error("Storage: %s not written: %s", folder, reason(error))

    with profile(schedule=schedule, on_trace_ready=save) as profiler:
        try:
            yield profiler
        finally:
            interrupted = True  # torch also saves when the context ends
