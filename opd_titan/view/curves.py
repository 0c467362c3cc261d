"""The run's curves, read from its TensorBoard events."""

from __future__ import annotations

import math
from pathlib import Path

# The name of each curve in TensorBoard, and on the page.
CURVES = {
    "kl/student_teacher": "kl",
    "validation/gap_recovered": "gap",
    "rollout/response_tokens_mean": "length",
    "rollout/truncated_fraction": "cut",
    "validation/accuracy": "accuracy",
    "validation/teacher_accuracy": "teacher",
}
_MAX_POINTS = 2000  # more than a screen can show


def read_curves(dump_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) points of each curve; empty for a run without events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (dump_folder / "tb").is_dir():
        return {}
    # It drops steps that a resumed run repeated, and stops at the end of a truncated file.
    sizes = {"scalars": _MAX_POINTS}
    events = EventAccumulator(str(dump_folder / "tb"), size_guidance=sizes).Reload()
    curves = {}
    for tag in CURVES.keys() & set(events.Tags()["scalars"]):
        points = [(e.step, float(f"{e.value:.6g}")) for e in events.Scalars(tag)]
        curves[CURVES[tag]] = [point for point in points if math.isfinite(point[1])]
    return {name: curves[name] for name in CURVES.values() if curves.get(name)}
