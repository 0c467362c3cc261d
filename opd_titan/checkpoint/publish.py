"""Folders that are whole or not there: written as `<name>.tmp`, then renamed. Rank 0 calls."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from opd_titan.checkpoint.faults import naming

logger = logging.getLogger("opd_titan")

LATEST = "latest"
_REPLACED = ".replaced"


def tmp_of(final: Path) -> Path:
    """Where `final` is until it is whole."""
    return final.with_name(final.name + ".tmp")


def fresh_tmp(final: Path) -> None:
    """An empty `tmp_of(final)`; what a killed run left there is deleted."""
    tmp = tmp_of(final)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)


def publish(final: Path) -> None:
    """Put the finished `tmp_of(final)` in its place, after its bytes are on the disk.

    Raises:
        OSError: what was there is there still.
    """
    tmp = tmp_of(final)
    for path in [*tmp.iterdir(), tmp]:
        _fsync(path)
    # A folder cannot be renamed onto a full one. Not ".old": checkpoints set aside are called so.
    replaced = final.with_name(final.name + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        tmp.rename(final)
    finally:
        restore_replaced(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def link_latest(final: Path) -> None:
    """Let `latest` beside `final` lead to it: a name that recipes and scripts can count on.

    Relative, so that the folder can be moved. Where there are no links it is done without.
    """
    link, new = final.with_name(LATEST), final.with_name(LATEST + ".tmp")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(final.name)
        new.replace(link)
    except OSError as error:
        logger.warning("%s: no link to %s (%s)", link, final.name, error.strerror)


def lead_back(folder: Path, step: int) -> None:
    """Let `latest` lead to the export of an earlier step again; 0: to none.

    A run that goes back has given up what it exported since.
    """
    link = folder / LATEST
    if step and (folder / f"step-{step}").is_dir():
        link_latest(folder / f"step-{step}")
    elif link.is_symlink():
        with suppress(OSError):
            link.unlink()


def restore_replaced(final: Path) -> None:
    """Put back what had to make way for something that did not come: its run was killed."""
    replaced = final.with_name(final.name + _REPLACED)
    if replaced.exists() and not final.exists():
        replaced.rename(final)


def clear_leftovers(folder: Path) -> None:
    """Put right what a killed run left in a folder of steps: half-written, half-replaced ones."""
    for replaced in folder.glob("step-*" + _REPLACED):
        restore_replaced(replaced.with_suffix(""))
        shutil.rmtree(replaced, ignore_errors=True)
    for tmp in folder.glob("step-*.tmp"):
        shutil.rmtree(tmp, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)
