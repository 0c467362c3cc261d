"""Find and read a data set's rows, from the hub or from disk, and know where each row lies."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from opd_titan.data.files import (
    FORMATS,
    array_length,
    blame_line,
    check_file,
    first_line,
    is_data,
    row_lines,
    suffix,
)
from opd_titan.data.sources import DatasetSpec, Record, RowError, dataset_spec
from opd_titan.errors import DataError

if TYPE_CHECKING:
    import datasets

# Where a folder keeps its files: itself, or `data/` as hub snapshots do.
DATA_FOLDERS = (".", "data")
ROWS_PER_READ = 1000


@dataclass(frozen=True)
class Part:
    """One split, whole. files: what it was read from, in order; empty for hub and arrow sets."""

    label: str
    table: datasets.Dataset
    files: list[Path] = field(default_factory=list)

    def locate(self, number: int) -> str:
        """Say where row `number` (from 0) lies: file and line for JSON Lines, else file and row."""
        for file in self.files:
            if FORMATS[suffix(file)] == "parquet":
                import pyarrow.parquet

                count = pyarrow.parquet.read_metadata(file).num_rows
            else:
                lines = row_lines(file)
                if number < len(lines):
                    return f"{file}, line {lines[number]}"
                # Not one row a line: an array, or one object over several lines.
                count = len(lines) or array_length(file)
            if number < count:
                return f"{file}, row {number + 1}"
            number -= count
        return f"{self.label}, row {number + 1}"


@dataclass(frozen=True)
class Rows:
    """The rows that `split` asks for. source: one phrase for the log.

    numbers: each row's number in the source, from 0, as though the named splits stood one after
        another, whole: row 3 of "train[100:200]" is number 103.
    """

    spec: DatasetSpec
    parts: list[Part]
    numbers: list[int]
    source: str
    section: str

    def locate(self, number: int) -> str:
        """Say where the row with this number lies, counting from 1 as people do."""
        for part in self.parts:
            if number < part.table.num_rows:
                break
            number -= part.table.num_rows
        return part.locate(number)

    def error(self, number: int, message: object) -> DataError:
        """Return the one-line DataError for a row at fault."""
        line = " ".join(str(message).split())
        return DataError(f"{self.section}.path: {self.locate(number)}: {line}")

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield (number, record) in the source's order. Raises DataError at a row at fault."""
        import datasets

        table = datasets.concatenate_datasets([part.table for part in self.parts])
        if self.numbers != list(range(table.num_rows)):
            table = table.select(self.numbers)
        numbers = iter(self.numbers)
        for columns in self._decoded(table.iter(batch_size=ROWS_PER_READ)):
            for values in zip(*columns.values(), strict=True):
                number = next(numbers)
                try:
                    yield number, self.spec.to_record(dict(zip(columns, values, strict=True)))
                except RowError as error:
                    raise self.error(number, f"{error} (dataset {self.spec.name})") from error

    def _decoded(self, batches: Iterator[dict[str, list]]) -> Iterator[dict[str, list]]:
        """Arrow takes text on trust when it reads a file; only here does bad UTF-8 come out."""
        try:
            yield from batches
        except UnicodeDecodeError as error:
            for file in (file for part in self.parts for file in part.files):
                blame_line(file, self.section)
            where = ", ".join(part.label for part in self.parts)
            raise DataError(f"{self.section}.path: {where}: text that is not UTF-8") from error


def load_rows(dataset: str, path: str, split: str, section: str = "data") -> Rows:
    """Find the rows of `split` of a data set named in `sources.DATASETS`.

    path: "" for the set's home on the hub; else a `save_to_disk` folder (a plain Dataset is taken
        as the split asked for, whatever its name); a folder with `<split>.jsonl`, `.json`,
        `.parquet`, `.jsonl.gz` or `<split>-*` shards, in it or in its `data/` (or, for gsm8k,
        `main/`), or with one single data file, which then is "train"; one such file, taken as the
        split asked for; else a hub id, "org/name" or "org/name:config".
    split: as `datasets` writes it: "train", "train[:100]", "train[10%:20%]+test".

    Raises DataError, naming the key, file and line, whenever there is nothing sound to return.
    """
    spec = dataset_spec(dataset, section)
    names = list(dict.fromkeys(re.sub(r"\[.*", "", part).strip() for part in split.split("+")))
    local = Path(path).expanduser()
    with _quiet():
        if path and local.exists():
            parts = [_local_part(spec, local, name, section) for name in names]
            source = path
        else:
            parts, source = _hub_parts(spec, path, names, section)
    parts = [_with_columns(spec, part, section) for part in parts]
    numbers = _chosen_rows(split, dict(zip(names, parts, strict=True)), section)
    if not numbers:
        raise DataError(f'{section}.path: {source} holds no rows in split "{split}"')
    return Rows(spec, parts, numbers, f"{source} ({split})", section)


def looks_like_hub_id(name: str) -> bool:
    """Tell whether `name` can be "org/name"; a path that starts with `.`, `/` or `~` cannot."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars off a terminal, and no log lines beside the one-line errors raised here."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    verbosity = datasets.utils.logging.get_verbosity()
    if not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"):
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _hub_parts(
    spec: DatasetSpec, path: str, names: list[str], section: str
) -> tuple[list[Part], str]:
    """Read whole splits from the hub, or from the cache of an earlier download."""
    import datasets

    hub_id, _, config = path.partition(":")
    if not path:
        if not spec.hub_id:
            raise DataError(
                f'{section}.path is empty and dataset "{spec.name}" has no home on the hub; give a '
                'folder, a file or a hub id "org/name"'
            )
        hub_id, config = spec.hub_id, spec.hub_config or ""
    elif not looks_like_hub_id(hub_id) or suffix(Path(hub_id)):
        raise DataError(
            f'{section}.path = "{path}" does not exist; give a folder, a .jsonl, .json or .parquet '
            'file, or a hub id "org/name"'
        )
    parts = []
    for name in names:
        try:
            table = datasets.load_dataset(hub_id, config or None, split=name)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(
                f'{section}.path: "{hub_id}" is neither a local path nor a data set on the hub (or '
                "it is private: log in first)"
            ) from error
        except ValueError as error:  # an unknown split or config: the message lists the known
            raise DataError(
                f'{section}.path: "{hub_id}", {section}.split = "{name}": {first_line(error)}'
            ) from error
        except Exception as error:
            raise DataError(
                f'{section}.path: "{hub_id}" is no local path and cannot be read from the hub '
                f"({first_line(error)}); without a network, give a downloaded copy's folder as "
                f"{section}.path"
            ) from error
        parts.append(Part(f"{hub_id}, split {name}", table))
    return parts, f"{hub_id}:{config}" if config else hub_id


def _local_part(spec: DatasetSpec, path: Path, name: str, section: str) -> Part:
    """Read one whole split from a folder or a file that exists."""
    import datasets

    is_dict = (path / "dataset_dict.json").is_file()
    if is_dict or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(
                f"{section}.path: the save_to_disk folder {path} cannot be read "
                f"({first_line(error)})"
            ) from error
        if is_dict and name not in saved:
            raise _no_split(section, path, name, list(saved))
        return Part(f"{path}, split {name}", saved[name] if is_dict else saved)

    files = _split_files(spec, path, name, section) if path.is_dir() else [path]
    for file in files:
        check_file(file, section)
    # `datasets` splits names at characters like "[" or "*": escape what it would take as a pattern.
    patterns = [re.sub(r"([*?\[])", r"[\1]", str(file)) for file in files]
    try:
        table = datasets.load_dataset(
            FORMATS[suffix(files[0])], data_files={"rows": patterns}, split="rows"
        )
    except Exception as error:
        for file in files:
            blame_line(file, section)
        names = ", ".join(map(str, files))
        cause = first_line(error.__cause__ or error)
        raise DataError(f"{section}.path: {names} cannot be read: {cause}") from error
    return Part(f"{path}, split {name}", table, files)


def _split_files(spec: DatasetSpec, folder: Path, name: str, section: str) -> list[Path]:
    """Choose the files of one split by name; see `load_rows` for the rule."""
    subfolders = (*DATA_FOLDERS, *filter(None, [spec.hub_config]))
    every = [f for sub in subfolders for f in sorted((folder / sub).glob("*")) if is_data(f)]
    mine = [f for f in every if _split_name(f) == name]
    # One folder's one format: a train.jsonl beside its own train.parquet must not count twice.
    kinds = dict.fromkeys((f.parent, suffix(f)) for f in mine)
    if len(kinds) > 1:
        shown = ", ".join(str(f) for f in mine[:4])
        raise DataError(
            f'{section}.path: {folder} holds split "{name}" more than once ({shown}); give the '
            f"file itself as {section}.path"
        )
    if not mine and len(every) == 1 and name == "train":
        return every
    if not mine:
        raise _no_split(section, folder, name, sorted({_split_name(f) for f in every}))
    return mine


def _no_split(section: str, folder: Path, name: str, known: list[str]) -> DataError:
    if not known:
        return DataError(
            f"{section}.path: {folder} holds no data; it must be a save_to_disk folder or hold "
            f"{name}.jsonl, {name}.json or {name}.parquet"
        )
    shown = ", ".join(f'"{split}"' for split in known)
    return DataError(f'{section}.split = "{name}" is not in {folder}; it holds {shown}')


def _split_name(file: Path) -> str:
    """`train.jsonl` -> "train", `train-00003-of-00120.parquet` -> "train"."""
    return file.name.removesuffix(suffix(file)).split("-")[0]


def _with_columns(spec: DatasetSpec, part: Part, section: str) -> Part:
    """Keep the columns that the data set reads. Raises DataError for one that is missing."""
    have = part.table.column_names
    for wanted in spec.columns:
        if not set(wanted.split("|")) & set(have):
            where = ", ".join(map(str, part.files)) or part.label
            shown = " or ".join(f"'{name}'" for name in wanted.split("|"))
            raise DataError(
                f"{section}.path: {where} has no column {shown}, which dataset {spec.name} needs; "
                f"it has {', '.join(repr(name) for name in have) or 'none'}"
            )
    used = [name for wanted in spec.columns for name in wanted.split("|")]
    keep = [name for name in (*used, *spec.optional_columns) if name in have]
    return Part(part.label, part.table.select_columns(keep), part.files)


def _chosen_rows(split: str, parts: dict[str, Part], section: str) -> list[int]:
    """Turn split syntax into row numbers over the parts laid end to end, each row at most once."""
    from datasets import ReadInstruction

    sizes = {name: part.table.num_rows for name, part in parts.items()}
    try:
        slices = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f'{section}.split = "{split}" is not a split; write "train", "train[:100]", '
            f'"train[10%:20%]" or a sum of such ({first_line(error)})'
        ) from error
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += size
    chosen = (starts[s.splitname] + i for s in slices for i in range(s.from_, s.to))
    return list(dict.fromkeys(chosen))
