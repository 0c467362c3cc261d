"""The run's curves from its TensorBoard events, as TensorBoard would show them."""

from __future__ import annotations

import math
from pathlib import Path

# Drawn: TensorBoard's name, and ours.
CURVES = {
    "kl/student_teacher": "kl",
    "validation/gap_recovered": "gap",
    "rollout/response_tokens_mean": "length",
    "rollout/truncated_fraction": "cut",
    "validation/accuracy": "accuracy",
    "validation/teacher_accuracy": "teacher",
}
_MOST_POINTS = 2000


def read_curves(dump_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by our name, in order of the steps; of a run without events, nothing.

    A file that breaks off, as that of a run that goes on may, is read up to there.
    """
    # In the order of their names, which start with the second that they were begun in.
    files = sorted((dump_folder / "tb").glob("events.out.tfevents.*"))
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES.values()}
    for path in files:
        _read(path, curves)
    return {name: _thin(sorted(points.items())) for name, points in curves.items() if points}


def _read(path: Path, curves: dict[str, dict[int, float]]) -> None:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    try:
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                # A resumed run does these steps again.
                for points in curves.values():
                    for step in [s for s in points if s >= event.step]:
                        del points[step]
            for value in event.summary.value:
                name = CURVES.get(value.tag)
                if name is not None and math.isfinite(value.simple_value):
                    curves[name][event.step] = float(f"{value.simple_value:.6g}")
    except (DecodeError, OSError):
        return


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """No more than can be told apart on a screen, the last one among them."""
    stride = -(-len(points) // _MOST_POINTS)
    return points[::-stride][::-1] if stride > 1 else points
