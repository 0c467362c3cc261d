"""The differences between the dump folders of two runs, except measured times and memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_world import MEASURED, rollout_bytes
from torch import Tensor


def differences(truth: Path, other: Path) -> list[str]:
    """Return a line for each difference in files, scalars, rollouts, exports and checkpoints."""
    found = [f"left over: {path}" for path in leftovers(other)]
    found += _names(truth, other, ".")
    found += _scalars(truth, other)
    a, b = rollout_bytes(truth), rollout_bytes(other)
    found += [
        f"rollouts/{name} differs" for name in a.keys() | b.keys() if a.get(name) != b.get(name)
    ]
    found += _exports(truth, other)
    found += _checkpoints(truth, other)
    name = "config.resolved.toml"
    a_text, b_text = ((folder / name).read_text() for folder in (truth, other))
    if a_text.replace(str(truth), str(other)) != b_text:
        found.append(f"{name} differs")
    return found


def leftovers(folder: Path) -> list[str]:
    """Return temporary and replaced files that nothing has removed."""
    paths = (path for path in folder.rglob("*") if path.suffix in (".tmp", ".replaced"))
    return sorted(str(path.relative_to(folder)) for path in paths)


def _names(truth: Path, other: Path, inside: str) -> list[str]:
    a, b = ({path.name for path in (folder / inside).iterdir()} for folder in (truth, other))
    missing, more = sorted(a - b), sorted(b - a)
    found = [f"{inside}: no {name}" for name in missing]
    return found + [f"{inside}: {name} should not be there" for name in more]


# --------------------------------------------------------------------- TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each scalar, in the order that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    return {n: [(e.step, e.value) for e in read.Scalars(n)] for n in read.Tags()["scalars"]}


def _scalars(truth: Path, other: Path) -> list[str]:
    a, b = events(truth), events(other)
    found = []
    for name in sorted(a.keys() | b.keys()):
        steps_a, steps_b = ([step for step, _ in run.get(name, [])] for run in (a, b))
        if len(set(steps_b)) < len(steps_b):
            twice = sorted(n for n, count in Counter(steps_b).items() if count > 1)
            found.append(f"scalar {name}: steps {twice} come twice")
        if gap := sorted(set(steps_a) - set(steps_b)):
            found.append(f"scalar {name}: no steps {gap}")
        if more := sorted(set(steps_b) - set(steps_a)):
            found.append(f"scalar {name}: steps {more} should not be there")
        if steps_b != sorted(steps_b):
            found.append(f"scalar {name}: steps are not in order")
        values = dict(b.get(name, []))
        # repr: NaN is the same as NaN here.
        bad = [n for n, value in a.get(name, []) if n in values and repr(values[n]) != repr(value)]
        if bad and not name.startswith(MEASURED):
            found.append(f"scalar {name}: other values at steps {bad}")
    return found


# ----------------------------------------------------------- exports and checkpoints


def _exports(truth: Path, other: Path) -> list[str]:
    found = _names(truth, other, "hf")
    for folder in sorted((truth / "hf").iterdir()):
        inside = f"hf/{folder.name}"
        if (other / inside).is_dir():
            found += _names(truth, other, inside)
            theirs = (other / inside / path.name for path in sorted(folder.iterdir()))
            found += [
                f"{inside}/{path.name} differs"
                for path in theirs
                if path.exists() and _content(path, other) != _content(folder / path.name, truth)
            ]
    return found


def _content(path: Path, run: Path) -> bytes:
    """Return a file without the folder of its run, which the recipe in a model card has."""
    return path.read_bytes().replace(str(run).encode(), b"")


def _checkpoints(truth: Path, other: Path) -> list[str]:
    found = _names(truth, other, "checkpoint")
    for folder in sorted((truth / "checkpoint").iterdir()):
        inside = f"checkpoint/{folder.name}"
        if not (other / inside).is_dir():
            continue
        found += _names(truth, other, inside)
        a, b = (tensors(run / inside) for run in (truth, other))
        if a.keys() != b.keys():
            found.append(f"{inside}: other tensors: {sorted(a.keys() ^ b.keys())}")
        for name in a.keys() & b.keys():
            if not torch.equal(a[name], b[name]):
                found.append(f"{inside}: {name} differs")
        states = [_plain(run / inside / "train_state.json") for run in (truth, other)]
        found += [f"{inside}: train_state.json differs"] * (states[0] != states[1])
    return found


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that one process saved."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _plain(path: Path) -> dict[str, Any]:
    """Return the JSON state, with only the number of measured scalars."""
    state = json.loads(path.read_text())
    window = {
        name: len(values) if name.startswith(MEASURED) else values
        for name, values in state["recorder"]["window"].items()
    }
    return {**state, "recorder": window}
