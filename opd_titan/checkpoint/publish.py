"""Folders that are complete or absent: written as `<name>.tmp`, then renamed. Rank 0 calls."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from opd_titan.checkpoint.faults import name_file_in_errors

logger = logging.getLogger("opd_titan")

LATEST = "latest"
_REPLACED = ".replaced"


def tmp_of(final: Path) -> Path:
    """Return where a folder is until it is complete."""
    return final.with_name(final.name + ".tmp")


def fresh_tmp(final: Path) -> None:
    """Make `tmp_of(final)`, empty: what a killed run left there is deleted."""
    tmp = tmp_of(final)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)


def write_file(path: Path, content: str) -> None:
    """Write a text file. Raise OSError, naming it, if that fails."""
    with name_file_in_errors(path):
        path.write_text(content, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with name_file_in_errors(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def publish(final: Path) -> None:
    """Rename `tmp_of(final)`, which is complete, to `final`, after its bytes are on the disk.

    Raises:
        OSError: an older `final` is still there.
    """
    tmp = tmp_of(final)
    for path in [*tmp.iterdir(), tmp]:
        sync_to_disk(path)
    # A folder cannot be renamed to one that has files. Not ".old": that is a step set aside.
    replaced = final.with_name(final.name + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        tmp.rename(final)
    finally:
        restore_replaced(final.parent)
    sync_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Rename back the steps that were to be replaced when a run was killed between two renames."""
    for replaced in folder.glob("*" + _REPLACED):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed run left in a folder of steps; restore what it was about to replace."""
    restore_replaced(folder)
    for pattern in ("step-*" + _REPLACED, "step-*.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def link_latest(final: Path) -> None:
    """Make the link `latest` beside `final` point to it.

    The link is relative, so that the folder can be moved. Where links are not supported, a warning
    says so.
    """
    link, new = final.with_name(LATEST), final.with_name(LATEST + ".tmp")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(final.name)
        new.replace(link)
    except OSError as error:
        logger.warning("%s: no link to %s (%s)", link, final.name, error.strerror)


def reset_latest(folder: Path, step: int) -> None:
    """Make `latest` point to the export of an earlier step again; delete it if step is 0.

    A run that goes back has given up what it exported since.
    """
    link = folder / LATEST
    if step and (folder / f"step-{step}").is_dir():
        link_latest(folder / f"step-{step}")
    elif link.is_symlink():
        with suppress(OSError):
            link.unlink()
