"""Data files on disk: where each row of one lies, and which line is broken.

Reading goes through `datasets`, whose errors rarely say which line of which file is at fault; so
after a failure the files are read once more here, only to find the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from opd_titan.errors import DataError, first_line, reason

# Suffix -> the `datasets` builder that reads it.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BOM_AND_BLANK = b"\xef\xbb\xbf \t\r\n"
# Of a row. Arrow takes no more levels; some ten thousand overflow its stack and kill the process.
MAX_DEPTH = 63
_BRACKETS = b'"[]{}'
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_NUMBER_END = 2**64


def check_file(file: Path) -> None:
    """Catch what `datasets` reports badly or, for a JSON line that is no object, crashes on."""
    if file.suffix not in FORMATS:
        raise DataError(f"path: {file} must end in one of {', '.join(FORMATS)}")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"path: {file} is empty")
        if _is_json(file):
            with file.open("rb") as lines:
                plain = all(map(_is_plain, lines))
            if not plain:
                _json_places(file)
    except OSError as error:
        raise DataError(f"path: {file} cannot be read: {reason(error)}") from error


def is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file in a folder and cannot lead out of it.

    An index, a manifest or a data set is data, and must not point anywhere else.
    """
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def check_saved(folder: Path) -> None:
    """Raise DataError where the `state.json` of a save_to_disk folder names files outside of it."""
    state = folder / "state.json"
    for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
        name = entry["filename"]
        if not is_plain_name(name):
            raise DataError(f"path: {state} names {name!r}; expected the name of a file beside it")


def blame(files: list[Path]) -> None:
    """Raise DataError at the first place in JSON files that is not sound, if there is one."""
    fields = 0
    for file in filter(_is_json, files):
        for place, row in _json_rows(file):
            fields += len(row)
            if problem := _problem(row):
                raise DataError(f"path: {file}, {place}: {problem}")
    if not fields and all(map(_is_json, files)):
        raise DataError(f"path: {', '.join(map(str, files))}: the rows are objects without fields")


def locate(files: list[Path], number: int) -> str | None:
    """Say where row `number` (from 0) of the files lies: file and line for JSON Lines, else row."""
    for file in files:
        if _is_json(file):
            places = _json_places(file)
        else:
            import pyarrow.parquet

            count = pyarrow.parquet.read_metadata(file).num_rows
            places = [f"row {n}" for n in range(1, count + 1)]
        if number < len(places):
            return f"{file}, {places[number]}"
        number -= len(places)
    return None


def _is_json(file: Path) -> bool:
    return FORMATS[file.suffix] == "json"


def _is_plain(line: bytes) -> bool:
    """Whether this can be a line of JSON Lines; if not, the file is an array or at fault."""
    start = line.lstrip(BOM_AND_BLANK)[:1]
    return not start or (start == b"{" and not _too_deep(line))


def _json_places(file: Path) -> list[str]:
    """Where each row lies. Raises DataError at the first that is not a JSON object."""
    return [place for place, _ in _json_rows(file)]


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row lies, and the row. Raises DataError at the first that is not an object."""
    content = file.read_bytes()
    lines = enumerate(content.split(b"\n"), 1)
    filled = [(number, line) for number, line in lines if line.strip(BOM_AND_BLANK)]
    if not filled:
        raise DataError(f"path: {file} holds no rows")
    start = filled[0][1].strip(BOM_AND_BLANK)
    # An array, or an object over several lines of a .json file; else JSON Lines.
    if start.startswith(b"[") or (start == b"{" and file.suffix == ".json"):
        value = _parse(content, file, 1)
        rows = enumerate(value if isinstance(value, list) else [value], 1)
        found = ((f"row {number}", row) for number, row in rows)
    else:
        found = ((f"line {number}", _parse(line, file, number)) for number, line in filled)
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"path: {file}, {place}: not a JSON object; each row must be one")
        yield place, row


def _parse(text: bytes, file: Path, first: int) -> Any:
    """Parse JSON that starts at line `first` of the file; DataError names the line at fault."""
    line, cause, problem = first, ValueError(), ""
    try:
        if _too_deep(text):
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        cause, problem = error, "not UTF-8"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        cause, problem = error, f"broken JSON: {error.msg} (column {error.colno})"
    except ValueError as error:  # too deep, a repeated field, a number of thousands of digits
        cause, problem = error, first_line(error).partition(";")[0]
        if b"\n" in text.strip():
            raise DataError(f"path: {file}: {problem}") from cause
    raise DataError(f"path: {file}, line {line}: {problem}") from cause


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is given twice")
    return row


def _too_deep(text: bytes) -> bool:
    """Whether a row in JSON text has more than MAX_DEPTH levels of arrays and objects.

    Counted without parsing. An array around the rows is a level of its own.
    """
    if len(text) <= 2 * MAX_DEPTH:
        return False
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_BRACKETS)
    bare = re.sub(rb'"[^"]*"?', b"", bare)
    depth = max(accumulate(1 if c in b"[{" else -1 for c in bare), default=0)
    return depth > MAX_DEPTH + bare.startswith(b"[")


def _problem(value: Any) -> str:
    """What in a parsed value Arrow cannot hold; empty if nothing is."""
    problems: Iterable[str]
    if isinstance(value, dict):
        problems = (_problem(part) for pair in value.items() for part in pair)
    elif isinstance(value, list):
        problems = map(_problem, value)
    elif isinstance(value, str):
        half = next((c for c in value if "\ud800" <= c <= "\udfff"), "")
        return f"half of a surrogate pair ({half!r}) is no character" if half else ""
    elif isinstance(value, (int, float)) and not abs(value) < _NUMBER_END and value == value:
        return "a number too large for 64 bits"
    else:
        return ""
    return next(filter(None, problems), "")
