"""The folders of checkpoints, one a step: which are there, which are whole, which to go on from.

step-N            a checkpoint; written as step-N.tmp and renamed when every rank is done
step-N.damaged    was not whole when a run was to go on from it; kept for people, never read
step-N.old        of a run that was sent back to an earlier step and replaced it
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_titan.checkpoint.faults import refusing
from opd_titan.checkpoint.manifest import find_damage
from opd_titan.checkpoint.publish import clear_leftovers, fresh_tmp, restore_replaced, tmp_of
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.errors import CheckpointError, StorageError, reason

logger = logging.getLogger("opd_titan")

STATE = "train_state.json"
MANIFEST = "checksums.json"
_STEP = re.compile(r"step-(\d+)")


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder` that were finished, oldest first; none is read."""
    return [n for n in _steps(folder) if (folder / f"step-{n}" / STATE).is_file()]


def _steps(folder: Path) -> list[int]:
    """Every step that something in `folder` is called by, oldest first."""
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(p.name) for p in folder.iterdir())
    return sorted({int(m.group(1)) for m in matches if m and m.group(1) == str(int(m.group(1)))})


def agree_on_step(folder: Path, load_step: int, at_most: int | None = None) -> int | None:
    """The step to resume from, the same on every rank. All ranks call.

    Args:
        load_step: -1 is the newest that is intact, past any that are not (a warning names them);
            0 is none.
        at_most: pass later steps over.

    Raises:
        CheckpointError: the one that was asked for, or every one that is there, is damaged or
            absent; or the ranks do not see the same folder.
    """
    damaged: list[str] = []
    candidates = _candidates(folder, load_step)
    for step in [n for n in candidates if at_most is None or n <= at_most]:
        path = folder / f"step-{step}"
        damage = _agree_on_damage(path)
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
    """Raise CheckpointError on all ranks unless `step-N` at this path is whole. All ranks call."""
    damage = _agree_on_damage(path)
    if damage is not None:
        raise CheckpointError(f"{damage}; choose another checkpoint")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a `step-N` that was finished."""
    return (path / STATE).is_file()


def _candidates(folder: Path, load_step: int) -> list[int]:
    """What to try, in this order. One rank looks: a file system may show two ranks two lists."""
    found: list[Any] = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            found = [_look_for(folder, load_step)]
    dist.broadcast_object_list(found)
    return found[0]


def _look_for(folder: Path, load_step: int) -> list[int]:
    try:
        for replaced in folder.glob("step-*.replaced"):
            restore_replaced(replaced.with_suffix(""))
        there, complete = _steps(folder), complete_steps(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({reason(error)})") from error
    if load_step > 0 and load_step not in there:
        have = ", ".join(map(str, complete)) or "none"
        raise CheckpointError(
            f"checkpoint.load_step: {folder}/step-{load_step} is not a complete checkpoint; "
            f"complete steps: {have}; to go on with a run, -1 takes the newest intact one"
        )
    if load_step > 0:
        return [load_step]
    return there[::-1] if load_step < 0 else []


def _agree_on_damage(path: Path) -> str | None:
    """What the ranks, each reading its share, find wrong with a checkpoint. All ranks call."""
    _require_everywhere(path)
    start = time.perf_counter()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _damage(path, dist.get_rank(), dist.get_world_size()))
    logger.debug("Read %s to check it, in %.1f s", path, time.perf_counter() - start)
    return next((text for text in found if text is not None), None)


def _damage(path: Path, rank: int, world: int) -> str | None:
    if not path.is_dir():
        return f"{path}: is not a folder"
    return find_damage(path / MANIFEST, rank, world)


def open_folder(folder: Path) -> None:
    """Make the checkpoints' folder, and clear what killed runs left half-written. All ranks call.

    Raises:
        ConfigError, CheckpointError: a rank cannot write there, or the ranks do not share it; the
            first save, hours later, would fail.
    """
    rank = dist.get_rank()
    with raise_on_all_ranks(), refusing(folder):
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder)
    _require_everywhere(folder)
    with raise_on_all_ranks(), refusing(folder):
        probe = folder / f".writable-{rank}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)


def set_aside(folder: Path, after: int, suffix: str) -> list[int]:
    """Rename what is newer than step `after` to `step-N.<suffix>`. All ranks call.

    What comes after `after` will be another run's: it must neither be resumed from nor push this
    run's checkpoints out.

    Args:
        suffix: "old" for what a run replaces that was sent back, "damaged" for what is not whole.
            A name that is taken gets a number: nobody but people delete what was set aside.

    Returns:
        The steps that were set aside.
    """
    later: list[Any] = [[]]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            later = [[n for n in _steps(folder) if n > after]]
            for n in later[0]:
                (folder / f"step-{n}").rename(_free_name(folder / f"step-{n}.{suffix}"))
    dist.broadcast_object_list(later)
    if later[0]:
        names = ", ".join(f"step-{n}" for n in later[0])
        logger.info("Set aside as step-N.%s, for this run replaces them: %s", suffix, names)
    return later[0]


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def prune(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`, which is one. Rank 0 calls.

    Newer ones, if any, are of nobody knows whom: they neither count nor go.
    """
    for old in [n for n in complete_steps(folder) if n <= newest][:-keep]:
        gone = tmp_of(folder / f"step-{old}")
        try:
            shutil.rmtree(gone, ignore_errors=True)
            # First another name: killed half-way, it must not look whole.
            (folder / f"step-{old}").rename(gone)
            shutil.rmtree(gone)
        except OSError as error:  # the new one is safe: that is no reason to fail
            logger.warning("Checkpoint: %s cannot be deleted: %s", gone, reason(error))


def _require_everywhere(path: Path) -> None:
    seen = torch.tensor(int(path.exists()))
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    if not seen:
        raise CheckpointError(
            f"job.dump_folder: {path} is not there on every rank; the folder must be on a file "
            f"system that all nodes share"
        )


def make_tmp(final: Path) -> Path:
    """An empty `tmp_of(final)` that every rank sees. All ranks call.

    Raises:
        StorageError: it cannot be made, or a rank does not see it.
    """
    tmp = tmp_of(final)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            fresh_tmp(final)
    with raise_on_all_ranks():
        if not tmp.is_dir():
            raise StorageError(f"{tmp}: is not there on every rank")
    return tmp
