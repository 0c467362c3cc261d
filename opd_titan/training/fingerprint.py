"""The fingerprint of a job: digests of its models, data and objective.

Each checkpoint contains it, so that a different job does not resume from the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from opd_titan.config.resolve import ResolvedJob
from opd_titan.training.sources import ModelSource

_EDGE_BYTES = 64 * 1024
# By option: a digest ("id") and a description ("name").
Fingerprint = dict[str, dict[str, str]]


def fingerprint(
    job: ResolvedJob, sources: Mapping[str, ModelSource], sets: Mapping[str, tuple[int, str]]
) -> Fingerprint:
    """Return the fingerprint as plain JSON values.

    Options that only change how fast or how long a job learns are not part of it.

    Args:
        sets: the number of prompts and their digest, by the name of the set.
    """
    config = job.config
    found = {
        f"{role}.hf_path": _entry(_model_digest(source), str(source.folder))
        for role, source in sources.items()
    }
    for row in job.data_sets:
        count, digest = sets[row.name]
        name = f"{row.path} ({count:,} prompts)"
        if row.teacher != "teacher":
            digest, name = f"{digest} {row.teacher}", f"{name} scored by {row.teacher}"
        found[f"data.{row.name}.path" if row.name else "data.path"] = _entry(digest, name)
    if len(sets) > 1:
        weights = ", ".join(f"{row.name} {row.weight:g}" for row in job.data_sets)
        found["data.sets.weight"] = _entry(weights, weights)
    d = config.distill
    objective = d.objective + (f" with beta {d.beta}" if d.objective == "jsd" else "")
    found["distill.objective"] = _entry(objective, objective)
    if config.student.eos_token:  # it changes where responses end
        found["student.eos_token"] = _entry(config.student.eos_token, config.student.eos_token)
    found["reference.coef"] = _entry(str(config.reference.coef), str(config.reference.coef))
    return found


def differences(saved: Fingerprint, now: Fingerprint) -> dict[str, str]:
    """Return a description of each change, by option."""
    nothing = _entry("", "nothing")
    found = {}
    for key in {**saved, **now}:
        was, is_now = saved.get(key, nothing), now.get(key, nothing)
        if was["id"] != is_now["id"]:
            named = f"{key} was {was['name']} and is {is_now['name']}"
            same_name = was["name"] == is_now["name"]
            found[key] = f"{key} {was['name']} has changed content" if same_name else named
    return found


def _entry(digest: str, name: str) -> dict[str, str]:
    return {"id": digest, "name": name}


def _model_digest(source: ModelSource) -> str:
    """Return a digest of sizes and weights. Read only the start and end of each weight file."""
    digest = hashlib.sha256(repr(source.args).encode())
    if source.files is None:
        digest.update(f"random {source.spec.seed}".encode())
    for path in sorted({part.path for part in (source.files or {}).values()}):
        digest.update(_ends(path))
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        return b"%d" % size + head + file.read()
