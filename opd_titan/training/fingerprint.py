"""What makes a job this job and no other: its models, its data, its objective."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from opd_titan.config import JobConfig
from opd_titan.config.sets import data_sets
from opd_titan.training.models import ModelSource, random_seed

_EDGE_BYTES = 64 * 1024
# By key: what tells one from another, and what people call it.
Identity = dict[str, dict[str, str]]


def job_identity(
    config: JobConfig, sources: Mapping[str, ModelSource], sets: Mapping[str, tuple[int, str]]
) -> Identity:
    """Plain JSON values. What only changes how fast or how long a job learns is not in it.

    Args:
        sets: the number of prompts and their digest, by the name of the set.
    """
    found = {
        f"{role}.hf_path": _entry(_model_digest(source, config), str(source.folder))
        for role, source in sources.items()
    }
    for row in data_sets(config):
        count, digest = sets[row.name]
        told = f"{row.path} ({count:,} prompts)"
        if row.teacher:
            digest, told = f"{digest} {row.teacher}", f"{told} taught by {row.teacher}"
        found[f"data.{row.name}.path" if row.name else "data.path"] = _entry(digest, told)
    if len(sets) > 1:
        weights = ", ".join(f"{row.name} {row.weight:g}" for row in data_sets(config))
        found["data.sets.weight"] = _entry(weights, weights)
    d = config.distill
    objective = d.objective + (f" with beta {d.beta}" if d.objective == "jsd" else "")
    found["distill.objective"] = _entry(objective, objective)
    if config.student.eos_token:  # what ends a response
        found["student.eos_token"] = _entry(config.student.eos_token, config.student.eos_token)
    found["reference.coef"] = _entry(str(config.reference.coef), str(config.reference.coef))
    return found


def differences(saved: Identity, now: Identity) -> dict[str, str]:
    """By key that differs: what it was and what it is, in words."""
    nothing = _entry("", "nothing")
    found = {}
    for key in {**saved, **now}:
        was, is_now = saved.get(key, nothing), now.get(key, nothing)
        if was["id"] != is_now["id"]:
            named = f"{key} was {was['name']} and is {is_now['name']}"
            same_name = was["name"] == is_now["name"]
            found[key] = f"{key} {was['name']} has another content" if same_name else named
    return found


def _entry(digest: str, name: str) -> dict[str, str]:
    return {"id": digest, "name": name}


def _model_digest(source: ModelSource, config: JobConfig) -> str:
    """Of sizes and weights; of a file of these its two ends, which are quick to read."""
    digest = hashlib.sha256(repr(source.args).encode())
    if source.files is None:
        digest.update(f"random {random_seed(source.role, config)}".encode())
    for path in sorted(set((source.files or {}).values())):
        digest.update(_ends(path))
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        return b"%d" % size + head + file.read()
