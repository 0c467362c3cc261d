"""Chrome traces of whole training steps, one file per rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd_titan.errors import reason

logger = logging.getLogger("opd_titan")


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def maybe_profiler(
    enable: bool, interval: int, dump_folder: Path, rank: int, *, start_step: int = 0
) -> Iterator[Any]:
    """A profiler whose `.step()` is called at the end of each training step.

    Each step that is a multiple of `interval` leaves `<dump_folder>/profile/step-N/rank-R.json.gz`
    (open it in ui.perfetto.dev or chrome://tracing). The step before it warms the profiler up.
    A step that is left half-way, by an error or a signal, leaves no trace.

    Args:
        start_step: the last step that was done, 0 for a new run.
    """
    if not enable:
        yield _Off()
        return
    import torch
    from torch.profiler import ProfilerAction, ProfilerActivity, profile

    def schedule(steps_done: int) -> ProfilerAction:
        steps_before = -(start_step + steps_done + 1) % interval
        if steps_before == 0:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if steps_before == 1 else ProfilerAction.NONE

    saved = start_step

    def save(profiler: profile) -> None:
        nonlocal saved
        step = start_step + profiler.step_num
        # Torch also calls this on leaving, in the middle of a step that is not done.
        if step % interval or step == saved:
            return
        saved = step
        folder = Path(dump_folder) / "profile" / f"step-{step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"rank-{rank}.json.gz"))
        except OSError as error:  # a trace for people: no reason to lose the run
            logger.error("Storage: trace of step %s not written: %s", step, reason(error))

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, schedule=schedule, on_trace_ready=save) as profiler:
        yield profiler
