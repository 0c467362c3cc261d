"""Data files on disk: which there are, which of their lines hold rows, and which line is broken.

Reading goes through `datasets`, whose errors rarely say which line of which file is at fault; so
after a failure the files are read once more here, only to find the place.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import IO, Any

from opd_titan.errors import DataError

# Suffix -> the `datasets` builder that reads it.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".jsonl.gz": "json",
    ".json.gz": "json",
}
BOM_AND_BLANK = b"\xef\xbb\xbf \t\r\n"


def suffix(file: Path) -> str:
    """Return the known suffix that the file's name ends with, "" if none."""
    return next((s for s in FORMATS if file.name.endswith(s)), "")


def is_data(file: Path) -> bool:
    return file.is_file() and bool(suffix(file)) and file.name != "dataset_infos.json"


def check_file(file: Path, section: str) -> None:
    """Catch what `datasets` reports badly or, for a JSON line that is no object, crashes on."""
    ending = suffix(file)
    if not ending:
        known = ", ".join(FORMATS)
        raise DataError(f"{section}.path: {file} must end in one of {known}")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{section}.path: {file} is empty")
        if FORMATS[ending] == "json":
            with open_file(file) as lines:
                if not all(
                    line.lstrip(BOM_AND_BLANK).startswith(b"{")
                    for line in lines
                    if line.strip(BOM_AND_BLANK)
                ):
                    blame_line(file, section)
    except (OSError, EOFError) as error:
        raise DataError(f"{section}.path: {file} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its class when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def open_file(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def row_lines(file: Path) -> list[int]:
    """Line numbers (from 1) of a JSON Lines file's rows; blank lines hold none. [] if not such."""
    with open_file(file) as lines:
        rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip(BOM_AND_BLANK)]
    one_each = all(line.lstrip(BOM_AND_BLANK).startswith(b"{") for _, line in rows)
    return [n for n, _ in rows] if one_each else []


def array_length(file: Path) -> int:
    with open_file(file) as stream:
        value = json.load(stream)
    return len(value) if isinstance(value, list) else 1


def blame_line(file: Path, section: str) -> None:
    """Raise DataError at the first place in a JSON file that is not an object, if there is one."""
    if FORMATS[suffix(file)] != "json":
        return
    with open_file(file) as stream:
        lines = list(stream)
    filled = [line for line in lines if line.strip(BOM_AND_BLANK)]
    if not filled:
        raise DataError(f"{section}.path: {file} holds no rows")
    if _is_one_value(file, filled):
        rows = _parse(b"".join(lines), file, 1, section)
        for item, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            if not isinstance(row, dict):
                raise DataError(f"{section}.path: {file}, row {item}: not a JSON object")
        return
    for number, line in enumerate(lines, 1):
        text = line.rstrip()  # or an error at the line's end would count as the next line's
        if line.strip(BOM_AND_BLANK) and not isinstance(_parse(text, file, number, section), dict):
            raise DataError(
                f"{section}.path: {file}, line {number}: not a JSON object; each line must be one"
            )


def _is_one_value(file: Path, filled: list[bytes]) -> bool:
    """Tell an array, or an object over several lines of a .json file, from JSON Lines."""
    if filled[0].lstrip(BOM_AND_BLANK).startswith(b"["):
        return True
    return not suffix(file).startswith(".jsonl") and filled[0].strip(BOM_AND_BLANK) == b"{"


def _parse(text: bytes, file: Path, first: int, section: str) -> Any:
    """Parse JSON that starts at line `first` of the file; DataError names the line at fault."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first + text.count(b"\n", 0, error.start)
        raise DataError(f"{section}.path: {file}, line {line}: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{section}.path: {file}, line {first + error.lineno - 1}: broken JSON: {error.msg} "
            f"(column {error.colno})"
        ) from error
