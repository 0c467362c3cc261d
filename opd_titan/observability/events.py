"""A TensorBoard event file that loses no record if the run is killed or the disk is full."""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections import deque
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from opd_titan.errors import reason

logger = logging.getLogger("opd_titan")

_MAX_PENDING = 10_000  # records that are kept in memory while the disk is full


class EventFile:
    """Write summaries to a new event file of a folder.

    `torch.utils.tensorboard.SummaryWriter` queues events for a thread; the first failed write ends
    the thread and loses the queue. Here a record stays in memory until its bytes are in the file.
    If a write fails, the next call writes the record again at the same position.

    Args:
        folder: created if it is missing.
        purge_step: TensorBoard drops the events of earlier files from this step on, so that a
            resumed run replaces the steps that it repeats.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self.path = _new_path(folder)
        self._size = 0  # bytes of whole records in the file
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._write()

    def add_summary(self, summary: Summary, step: int) -> None:
        """Write a summary. On return it is in the file, or an error was logged."""
        self._add(Event(step=step, summary=summary))
        self._write()

    def close(self) -> None:
        """Try once more to write pending records; log an error if they are lost."""
        if self._pending:
            self._write()
        if self._pending:
            logger.error("Storage: %s events are missing from %s", len(self._pending), self.path)

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._pending.append(record.getvalue())

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # Remove the part of a record that a failed write may have left.
                file.truncate(min(self._size, file.tell()))
                file.write(b"".join(self._pending))
                file.flush()
                self._size = file.tell()
        except OSError as error:  # missing metrics must not stop the run
            logger.error("Storage: TensorBoard's events in %s: %s", self.path.parent, reason(error))
            return
        self._pending.clear()


def _new_path(folder: Path) -> Path:
    """Return a path that sorts after every event file in the folder.

    TensorBoard reads event files in the order of their names, which begin with the time in seconds.
    Another start in the same second, or on a host with a slow clock, must not sort before the
    first one.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    second = max([int(time.time()), *(int(s) + 1 for s in seconds if s.isdecimal())])
    name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
    return folder / name
