"""The folders of checkpoints, one per step: which exist, which are intact, which to resume from.

step-N            a checkpoint; written as step-N.tmp and renamed when it is complete
step-N.damaged    was damaged when a run resumed from an earlier step
step-N.old        replaced by a run that went back to an earlier step

The program never reads or deletes the last two.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd_titan.checkpoint.manifest import find_damage
from opd_titan.checkpoint.publish import clear_leftovers, discard_tmp, restore_replaced, tmp_of
from opd_titan.distributed.agreement import call_on_rank_0, raise_on_all_ranks
from opd_titan.errors import CheckpointError, ConfigError, reason

logger = logging.getLogger("opd_titan")

STATE = "train_state.json"
MANIFEST = "checksums.json"
_STEP = re.compile(r"step-(0|[1-9]\d*)")


# ------------------------------------------------------------------ which step to resume from


def complete_steps(folder: Path) -> list[int]:
    """Return N of every `step-N` in `folder`, oldest first. No file is read."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, without checking that it is intact."""
    return (path / STATE).is_file()


def agree_on_step(folder: Path, load_step: int, at_most: int | None = None) -> int | None:
    """Return the step to resume from, the same on every rank. All ranks call.

    Args:
        load_step: the step; -1 for the newest intact one, with warnings about damaged ones; 0 for
            none.
        at_most: ignore later steps.

    Raises:
        CheckpointError: `load_step` is damaged or absent, or all steps are damaged, or the ranks
            do not see the same folder.
    """
    damaged: list[str] = []
    for step in call_on_rank_0(lambda: _candidates(folder, load_step)):
        if at_most is not None and step > at_most:
            continue
        damage = _agree_on_damage(folder / f"step-{step}")
        if damage is None:
            for text in damaged:
                logger.warning("Damaged checkpoint: %s; going back to step %s", text, step)
            return step
        damaged.append(damage)
    if not damaged:
        return None
    if load_step > 0:
        raise CheckpointError(
            f"checkpoint.load_step: step {load_step} is damaged: {damaged[0]}; choose another "
            f"(-1 takes the newest that is intact)"
        )
    raise CheckpointError(
        f"{damaged[0]}; no checkpoint in {folder} is intact: restore one, or start afresh with "
        f"checkpoint.load_step = 0"
    )


def require_intact(path: Path) -> None:
    """Raise CheckpointError on all ranks if `step-N` at this path is damaged. All ranks call."""
    damage = _agree_on_damage(path)
    if damage is not None:
        raise CheckpointError(f"{damage}; choose another checkpoint")


def _candidates(folder: Path, load_step: int) -> list[int]:
    """Return the steps to try, in this order. Rank 0 calls, because others may see another list."""
    if load_step == 0:
        return []
    try:
        restore_replaced(folder)
        steps = complete_steps(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({reason(error)})") from error
    if load_step < 0:
        return steps[::-1]
    if load_step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"checkpoint.load_step: {folder}/step-{load_step} is not a complete checkpoint; "
            f"complete steps: {have}; to continue a run, -1 takes the newest intact one"
        )
    return [load_step]


def _agree_on_damage(path: Path) -> str | None:
    """Return the damage of a checkpoint, or None. All ranks call; each checks its share."""
    _require_everywhere(path)
    mine: str | None = f"{path}: is not a folder"
    found: list[Any] = [None] * dist.get_world_size()
    if path.is_dir():
        mine = find_damage(path / MANIFEST, dist.get_rank(), dist.get_world_size())
    dist.all_gather_object(found, mine)
    return next((text for text in found if text is not None), None)


def _require_everywhere(path: Path) -> None:
    """Raise CheckpointError on all ranks if one of them does not see the path."""
    with raise_on_all_ranks():
        if not path.exists():
            raise CheckpointError(
                f"job.dump_folder: {path} is not there on every rank; the folder must be on a file "
                f"system that all nodes share"
            )


# ------------------------------------------------------------------ the folder of new steps


@contextmanager
def config_error_if_unwritable(folder: Path) -> Iterator[None]:
    """Raise ConfigError, which names `job.dump_folder`, for an OSError of the body.

    Before the run begins, a folder that cannot be written is the user's mistake.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"[job] dump_folder: {folder} cannot be written ({reason(error)}); choose a folder "
            f"that can"
        ) from error


def open_folder(folder: Path) -> None:
    """Make the checkpoints' folder and delete what killed runs left there. All ranks call.

    Raises:
        ConfigError, CheckpointError: a rank cannot write there, or the ranks do not share it.
            Without this check, the first save would fail hours later.
    """

    def make() -> None:
        with config_error_if_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder)

    call_on_rank_0(make)
    _require_everywhere(folder)
    with raise_on_all_ranks(), config_error_if_unwritable(folder):
        probe = folder / f".writable-{dist.get_rank()}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)


def set_aside(folder: Path, after: int, suffix: str) -> None:
    """Rename the steps later than `after` to `step-N.<suffix>`. All ranks call.

    The run will write these steps again. No run may resume from the old ones, and `prune` must not
    count them.

    Args:
        suffix: "old" or "damaged", see above. A number is appended if the name is taken.
    """

    def rename() -> list[int]:
        later = [n for n in complete_steps(folder) if n > after]
        for n in later:
            aside, number = folder / f"step-{n}.{suffix}", 1
            while aside.exists():
                number += 1
                aside = folder / f"step-{n}.{suffix}-{number}"
            (folder / f"step-{n}").rename(aside)
        return later

    later = call_on_rank_0(rename)
    if later:
        names = ", ".join(f"step-{n}" for n in later)
        logger.info("Set aside as step-N.%s, because this run replaces them: %s", suffix, names)


def prune(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`. All ranks call.

    Newer steps, if any, belong to another run: they are neither counted nor deleted.

    Args:
        keep: 0 keeps all.
    """

    def delete() -> None:
        steps = [n for n in complete_steps(folder) if n <= newest]
        # A step that has lost its files must not count as one that is kept.
        for old in [n for n in steps if is_checkpoint(folder / f"step-{n}")][:-keep]:
            path = folder / f"step-{old}"
            try:
                discard_tmp(path)
                # Renamed first: after a kill half-way it must not look complete.
                path.rename(tmp_of(path))
                shutil.rmtree(tmp_of(path))
            except OSError as error:  # the new checkpoint is safe: continue
                logger.warning("Checkpoint: %s cannot be deleted: %s", path, reason(error))

    if keep > 0:
        call_on_rank_0(delete)
