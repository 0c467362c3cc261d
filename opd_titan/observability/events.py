"""Numbers and texts on their way into TensorBoard's files, past disks that are full for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd_titan.errors import reason

logger = logging.getLogger("opd_titan")

# Of one step: what it calls on a SummaryWriter.
_Record = tuple[int, Callable[[Any], None]]

_MOST_PENDING = 10_000  # records
_SECONDS_TO_RETRY = 30.0  # each try leaves a file


class Events:
    """Writes records; what cannot be written is kept and tried again with the next ones.

    Args:
        purge_from: TensorBoard forgets what it has of this step and later ones.
    """

    def __init__(self, folder: Path, purge_from: int) -> None:
        self.folder, self._purge_from = folder, purge_from
        self._writer: Any = None
        self._pending: list[_Record] = []
        self._latest: list[_Record] = []  # written, of one step
        self._retry_at = 0.0
        self._write()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write a step's scalars."""

        def record(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self.record(step, record)

    def record(self, step: int, record: Callable[[Any], None]) -> None:
        """Have a step's record written: it is on the disk when this returns, unless it complains.

        Args:
            record: what it calls on a SummaryWriter; called again when that one fails.
        """
        if self._latest and self._latest[-1][0] != step:
            self._latest = []
        self._pending.append((step, record))
        if self._writer is not None or time.monotonic() >= self._retry_at:
            self._write()

    def close(self) -> None:
        if self._pending:
            self._write()
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            self._complain(error)
        if self._pending:
            first, last = self._pending[0][0], self._pending[-1][0]
            logger.error("Storage: TensorBoard lacks steps %s to %s for good", first, last)

    def _write(self) -> None:
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                _wait_for_a_later_second(self.folder)
                self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_from)
            for _, record in self._pending:
                record(self._writer)
            # On disk before the step's checkpoint is, or a crash leaves a gap.
            self._writer.flush()
        except OSError as error:  # numbers for people: no reason to lose the run
            self._complain(error)
            # Its thread is dead, and its file may hold some of what is pending: the next writer's
            # file has TensorBoard forget that, and what was well of the same step.
            self._writer, self._retry_at = None, time.monotonic() + _SECONDS_TO_RETRY
            self._pending = [*self._latest, *self._pending][-_MOST_PENDING:]
            self._latest = []
            if self._pending:
                self._purge_from = self._pending[0][0]
            return
        self._latest += [kept for kept in self._pending if kept[0] == self._pending[-1][0]]
        self._pending = []

    def _complain(self, error: OSError) -> None:
        logger.error("Storage: TensorBoard's events in %s: %s", self.folder, reason(error))


def _wait_for_a_later_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which start with the second.

    A run that is started again within the second, or on a host whose clock is a little behind,
    would be read before the run that it continues, and then purged by it.
    """
    names = [p.name.split(".")[3] for p in folder.glob("events.out.tfevents.*")]
    seconds = [int(name) for name in names if name.isdecimal()]  # there may be a user's own
    behind = max(seconds, default=0) + 1 - time.time()
    if behind > 60:
        logger.warning(
            "The clock is %.0f s behind the newest events in %s: TensorBoard will not show this "
            "part of the run after them",
            behind,
            folder,
        )
    elif behind > 0:
        time.sleep(behind)
