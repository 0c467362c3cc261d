"""Sizes and checksums of a folder's files, written beside them, and what differs from them later.

CRC-32 finds every run of up to 32 wrong bits and misses other damage once in 4 billion times, at
several GB a second and thread, more than disks deliver. It is not made to stop an attacker, who
would write a new manifest too: what is read is restricted elsewhere (see `dcp_io`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd_titan.checkpoint.faults import naming
from opd_titan.data.files import is_plain_name
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import reason

# Each piece of a file has its own checksum, so that any number of ranks and threads can share in
# a large file; a rank of any world may have written it.
PIECE_BYTES = 256 * 1024**2
_BUFFER_BYTES = 4 * 1024**2
_THREADS = 4  # of one rank; zlib and reading leave the interpreter to others

Entry = dict[str, Any]  # "size": bytes, "crc32": one number a piece, in hexadecimal


def describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The manifest's entries of these files, read back from where they lie.

    Raises:
        OSError: one of them cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    pieces = [
        (name, start) for name, size in sizes.items() for start in range(0, size, PIECE_BYTES)
    ]
    sums = _in_threads([(folder / name, at) for name, at in pieces], PIECE_BYTES)
    entries: dict[str, Entry] = {name: {"size": size, "crc32": []} for name, size in sizes.items()}
    for (name, _), value in zip(pieces, sums, strict=True):
        entries[name]["crc32"].append(value)
    return entries


def write_manifest(path: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest, which describes every file beside it."""
    content = {"piece_bytes": PIECE_BYTES, "files": dict(sorted(entries.items()))}
    with naming(path):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def find_damage(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with the files that a manifest describes, as one line; None if nothing is.

    Every rank looks at the sizes of all files and at its share of the bytes.

    Args:
        path: the manifest, beside the files.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, Entry] = content["files"]
        step = int(content["piece_bytes"])
        wanted = {
            (name, start): value
            for name, entry in entries.items()
            for start, value in zip(range(0, entry["size"], step), entry["crc32"], strict=True)
        }
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({reason(error)})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: is damaged, it is not a list of checksums"
    mine = sorted(wanted)[rank::world]
    try:
        for name, entry in entries.items():
            wrong = _wrong_at_sight(path.parent, name, entry["size"])
            if wrong:
                return f"{path.parent / name}: {wrong}"
        found = _in_threads([(path.parent / name, start) for name, start in mine], step)
    except OSError as error:
        return f"{error.filename}: cannot be read ({reason(error)})"
    for (name, start), value in zip(mine, found, strict=True):
        if value != wanted[name, start]:
            return f"{path.parent / name}: its bytes are not those that were written (CRC-32)"
    return None


def _wrong_at_sight(folder: Path, name: str, size: int) -> str | None:
    if not is_plain_name(name):
        return "is no name of a file beside its manifest"
    path = folder / name
    if not path.exists():
        return "is missing"
    if not path.is_file():
        return "is not a file any more"
    now = path.stat().st_size
    if now < size:
        return f"is truncated from {size} to {now} bytes"
    return f"has {now} bytes; {size} were written" if now > size else None


def _in_threads(pieces: list[tuple[Path, int]], length: int) -> list[str]:
    def checksum(piece: tuple[Path, int]) -> str:
        return _crc32(*piece, length)

    with ThreadPoolExecutor(max(1, min(_THREADS, len(pieces)))) as pool:
        return list(pool.map(checksum, pieces))


def _crc32(path: Path, start: int, length: int) -> str:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    value, left = 0, length
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while left > 0:
                got = file.readinto(buffer[: min(left, _BUFFER_BYTES)])
                if not got:
                    break
                value, left = zlib.crc32(buffer[:got], value), left - got
                beat()
    except OSError as error:  # read() does not say of which file
        raise OSError(error.errno, reason(error), str(path)) from error
    return f"{value:08x}"
