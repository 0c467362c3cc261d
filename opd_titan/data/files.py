"""Read the rows of JSON files, and detect changes of any data file.

Arrow infers one type for each column of a JSON file and casts the values to it, which changes
numbers, dates and texts. So this module parses these files, and keeps the values as written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import DataError, first_line, reason

Row = dict[str, Any]

BLOCK = 1 << 24  # bytes
# A file that was changed in the last seconds may change again without a change of its times.
_SETTLED = 2.0
_BLANK = b"\xef\xbb\xbf \t\r\n"  # with the byte order mark
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class WrittenFloat(float):
    """A JSON number with a fraction or an exponent; its text is the one in the file."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __repr__(self) -> str:
        return self.text


def is_plain_name(name: Any) -> bool:
    """Return whether this is a file name without folders.

    An index, a manifest or a data set may come from elsewhere, so it must not name files in other
    folders.
    """
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def read_json(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place in the file, "line 3" or "row 3".

    The file has one object per line, an array of objects, or one object over several lines.

    Raises:
        DataError: names the file, and the line if one is wrong.
    """
    try:
        with file.open("rb") as lines:
            filled = ((n, line) for n, line in enumerate(lines, 1) if line.strip(_BLANK))
            first = next(filled, None)
            if first is None:
                raise DataError(f"path: {file} {'has no rows' if lines.tell() else 'is empty'}")
            start = first[1].strip(_BLANK)
            if not start.startswith(b"[") and (start != b"{" or file.suffix == ".jsonl"):
                for number, line in chain([first], filled):
                    place = f"line {number}"
                    yield place, _checked(_parse(line.rstrip(b"\r\n"), file, number), file, place)
                return
        value = _parse(file.read_bytes(), file, 1)
    except OSError as error:
        raise DataError(f"path: {file} cannot be read: {reason(error)}") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"row {number}"
        yield place, _checked(row, file, place)


def _checked(row: Any, file: Path, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"path: {file}, {place}: not a JSON object; each row must be one")
    return row


def _parse(text: bytes, file: Path, first: int) -> Any:
    """Parse JSON that starts at line `first` of the file. Raise DataError naming the line."""
    line: int | None = first
    cause: Exception
    try:
        value = json.loads(
            text.decode("utf-8-sig"), parse_float=WrittenFloat, object_pairs_hook=_object
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        line, cause, problem = first + text.count(b"\n", 0, error.start), error, "not UTF-8"
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        cause, problem = error, f"half of a surrogate pair ({half!r}) is not a character"
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        cause, problem = error, f"broken JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:
        # A repeated field, a number with thousands of digits, or too many levels.
        line = None if b"\n" in text.strip() else first
        deep = isinstance(error, RecursionError)
        cause, problem = error, "nested too deeply" if deep else first_line(error).split(";")[0]
    place = f"{file}, line {line}" if line else str(file)
    raise DataError(f"path: {place}: {problem}") from cause


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is given twice")
    return row


def cache_folder() -> Path:
    """Return this program's folder in the cache of `datasets` (HF_DATASETS_CACHE).

    It may not exist yet, and users may delete it at any time.
    """
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, "opd_titan")


def digest_of_files(files: Sequence[Path]) -> str:
    """Return a hash of the files' contents.

    The files are read again only if a size, a time or an inode has changed.

    Raises:
        DataError: a file cannot be read.
    """
    names = repr([os.path.abspath(file) for file in files]).encode()
    note = cache_folder() / f"{hashlib.blake2b(names, digest_size=16).hexdigest()}.json"
    try:
        stats = [file.stat() for file in files]
        now = [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]
        with suppress(OSError, ValueError, TypeError, KeyError):
            noted = json.loads(note.read_text(encoding="utf-8"))
            if noted["files"] == now:
                return str(noted["digest"])
        digest = _digest(files)
    except OSError as error:
        raise DataError(f"path: {error.filename} cannot be read: {reason(error)}") from error
    if time.time() - max(max(s.st_mtime, s.st_ctime) for s in stats) > _SETTLED:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as new:
                json.dump({"files": now, "digest": digest}, new)
            os.replace(new.name, note)
    return digest


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            digest.update(b"%d " % os.fstat(content.fileno()).st_size)
            while block := content.read(BLOCK):
                digest.update(block)
                beat()
    return digest.hexdigest()
