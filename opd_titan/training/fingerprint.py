"""The fingerprint of a job: digests of its models, data and objective.

A checkpoint carries it, so that another job does not resume from it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_titan.config.resolve import ResolvedJob
from opd_titan.data.types import Prompt
from opd_titan.training.sources import ModelSource

_EDGE_BYTES = 64 * 1024
# By option: a digest ("id") and a description ("name").
Fingerprint = dict[str, dict[str, str]]


def fingerprint(
    job: ResolvedJob, sources: Mapping[str, ModelSource], sets: Mapping[str, Sequence[Prompt]]
) -> Fingerprint:
    """Return the fingerprint as plain JSON values.

    Options that only change how fast or how long a job learns are not part of it.

    Args:
        sets: the prompts by the name of their set.
    """
    config = job.config
    found = {
        f"{role}.hf_path": _entry(_model_digest(source), str(source.folder))
        for role, source in sources.items()
    }
    for row in job.data_sets:
        digest = _prompts_digest(sets[row.name])
        name = f"{row.path} ({len(sets[row.name]):,} prompts)"
        if row.teacher != "teacher":
            digest, name = f"{digest} {row.teacher}", f"{name} scored by {row.teacher}"
        found[f"data.{row.name}.path" if row.name else "data.path"] = _entry(digest, name)
    if len(sets) > 1:
        weights = ", ".join(f"{row.name} {row.weight:g}" for row in job.data_sets)
        found["data.sets.weight"] = _entry(weights, weights)
    d = config.distill
    objective = d.objective + (f" with beta {d.beta}" if d.objective == "jsd" else "")
    found["distill.objective"] = _entry(objective, objective)
    if config.student.eos_token:  # what ends a response
        found["student.eos_token"] = _entry(config.student.eos_token, config.student.eos_token)
    found["reference.coef"] = _entry(str(config.reference.coef), str(config.reference.coef))
    return found


def differences(saved: Fingerprint, now: Fingerprint) -> dict[str, str]:
    """Return, by option that differs, a description of the change."""
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
    """Return a digest of sizes and weights. Of a weight file it reads the two ends only."""
    digest = hashlib.sha256(repr(source.args).encode())
    if source.files is None:
        digest.update(f"random {source.spec.seed}".encode())
    for path in sorted(set((source.files or {}).values())):
        digest.update(_ends(path))
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        return b"%d" % size + head + file.read()


def _prompts_digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(array("q", (len(prompt.token_ids), *prompt.token_ids)).tobytes())
    return digest.hexdigest()
