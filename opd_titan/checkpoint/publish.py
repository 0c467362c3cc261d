"""Folders that are complete or absent: checkpoints and exports.

A folder is written as `<name>.tmp`. `publish` adds the checksums of its files, waits until all
bytes are on the disk, and renames it. Rank 0 calls.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError

from opd_titan.checkpoint.manifest import Entry, describe, manifest_text
from opd_titan.errors import reason

logger = logging.getLogger("opd_titan")

LATEST = "latest"
MODEL_CARD = "README.md"  # has no checksum, because users write their own
_REPLACED = ".replaced"


def tmp_of(final: Path) -> Path:
    """Return the path of a folder until it is complete."""
    return final.with_name(final.name + ".tmp")


def fresh_tmp(final: Path) -> None:
    """Make an empty `tmp_of(final)`. Delete what a killed run left there."""
    discard_tmp(final)
    tmp_of(final).mkdir(parents=True)


def discard_tmp(final: Path) -> None:
    """Delete `tmp_of(final)`, if it exists."""
    shutil.rmtree(tmp_of(final), ignore_errors=True)


def publish(final: Path, manifest: str, known: Mapping[str, Entry] = MappingProxyType({})) -> None:
    """Add the checksums to `tmp_of(final)`, and rename it to `final` once it is on the disk.

    An older `final` is replaced.

    Args:
        manifest: the name of the file with the checksums.
        known: checksums of files that need not be read again.

    Raises:
        OSError: a file cannot be read or written, or a folder cannot be renamed.
    """
    tmp = tmp_of(final)
    others = {path.name for path in tmp.iterdir()} - known.keys() - {MODEL_CARD}
    write_file(tmp / manifest, manifest_text({**known, **describe(tmp, others)}))
    for path in [*tmp.iterdir(), tmp]:
        sync_to_disk(path)
    # A rename cannot replace a folder that has files. (".old" would mean a step set aside.)
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
    """Restore the folders that a killed run was about to replace."""
    for replaced in folder.glob("*" + _REPLACED):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed run left in a folder of steps, and restore what it had moved away."""
    restore_replaced(folder)
    for pattern in ("step-*" + _REPLACED, "step-*.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def link_latest(folder: Path, step: int) -> None:
    """Make the link `latest` in `folder` point to `step-N`; delete it if there is no such folder.

    The link is relative, so that `folder` can be moved. If it cannot be written, log a warning.
    """
    link, new = folder / LATEST, folder / f"{LATEST}.tmp"
    try:
        if (folder / f"step-{step}").is_dir():
            new.unlink(missing_ok=True)
            new.symlink_to(f"step-{step}")
            new.replace(link)
        elif link.is_symlink():
            link.unlink()
    except OSError as error:
        logger.warning("%s: no link to step-%s (%s)", link, step, error.strerror)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file. Raise OSError, naming it, if that fails."""
    with name_file_in_errors(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with name_file_in_errors(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def name_file_in_errors(path: Path | str) -> Iterator[None]:
    """Add this file's name to an OSError of the body, also to one that safetensors wraps."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, reason(error), str(path)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
