"""Data files on disk: where each row of one lies, and which line is broken.

Reading goes through `datasets`, whose errors rarely say which line of which file is at fault; so
after a failure the files are read once more here, only to find the place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd_titan.errors import DataError, first_line

# Suffix -> the `datasets` builder that reads it.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BOM_AND_BLANK = b"\xef\xbb\xbf \t\r\n"


def check_file(file: Path) -> None:
    """Catch what `datasets` reports badly or, for a JSON line that is no object, crashes on."""
    if file.suffix not in FORMATS:
        raise DataError(f"path: {file} must end in one of {', '.join(FORMATS)}")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"path: {file} is empty")
        if _is_json(file):
            with file.open("rb") as lines:
                plain = all(line.lstrip(BOM_AND_BLANK)[:1] in (b"{", b"") for line in lines)
            if not plain:  # an array, or broken
                _json_places(file)
    except OSError as error:
        raise DataError(f"path: {file} cannot be read: {first_line(error)}") from error


def blame(files: list[Path]) -> None:
    """Raise DataError at the first place in JSON files that is not an object, if there is one."""
    for file in filter(_is_json, files):
        _json_places(file)


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


def _json_places(file: Path) -> list[str]:
    """Where each row lies. Raises DataError at the first that is not a JSON object."""
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
    places = []
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"path: {file}, {place}: not a JSON object; each row must be one")
        places.append(place)
    return places


def _parse(text: bytes, file: Path, first: int) -> Any:
    """Parse JSON that starts at line `first` of the file; DataError names the line at fault."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first + text.count(b"\n", 0, error.start)
        raise DataError(f"path: {file}, line {line}: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"path: {file}, line {first + error.lineno - 1}: broken JSON: {error.msg} "
            f"(column {error.colno})"
        ) from error
