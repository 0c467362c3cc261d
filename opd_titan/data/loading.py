"""Find and read a data set's rows, from the hub or from disk, and know where each row lies.

A DataError from here begins with the key at fault, without the config table that it stands in:
who knows the table puts it before.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_titan.data.files import FORMATS, blame, check_file, check_saved, locate
from opd_titan.data.hub import hub_in_reach, looks_like_hub_id
from opd_titan.data.sources import DATASETS, DatasetSpec, Record, RowError
from opd_titan.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT = re.compile(r"([\w.]+)(?:\[(-?\d{1,12}%?)?:(-?\d{1,12}%?)?\])?")


@dataclass(frozen=True)
class Rows:
    """The rows that `split` asks for.

    table: the whole split. numbers: each row's number in it, from 0: row 3 of "train[100:200]" is
        number 103.
    files: what it was read from, in order; empty for hub and save_to_disk sets.
    label, source: one phrase for the whole split and for the rows, for errors and the log.
    """

    spec: DatasetSpec
    table: Dataset
    numbers: range
    files: list[Path]
    label: str
    source: str

    def error(self, number: int, message: object) -> DataError:
        """Return the one-line DataError for the row with this number, wherever it lies."""
        place = locate(self.files, number) or f"{self.label}, row {number + 1}"
        return DataError(f"path: {place}: {' '.join(str(message).split())}")

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield (number, record) in the source's order. Raises DataError at a row at fault."""
        try:
            for number, row in zip(self.numbers, self.table.select(self.numbers), strict=True):
                try:
                    record = self.spec.to_record(row)
                except RowError as error:
                    raise self.error(number, f"{error} (dataset {self.spec.name})") from error
                yield number, record
        # Arrow takes text on trust when it reads a file; only here does bad UTF-8 come out.
        except UnicodeDecodeError as error:
            blame(self.files)
            raise DataError(f"path: {self.label}: text that is not UTF-8") from error


def load_rows(dataset: str, path: str, split: str) -> Rows:
    """Find the rows of `split` of a data set named in `sources.DATASETS`.

    path: "" for the set's home on the hub; else a `save_to_disk` folder (a plain Dataset is taken
        as the split asked for, whatever its name); a folder with `<split>.jsonl`, `.json`,
        `.parquet` or `<split>-*` shards, in it or in its `data/` (or, for gsm8k, `main/`), or with
        one single data file, which then is "train"; one such file, taken as the split asked for;
        else a hub id, "org/name" or "org/name:config".
    split: one split or a slice of it: "train", "train[:100]", "train[10%:20%]".

    Raises DataError, naming the key, file and line, whenever there is nothing sound to return.
    """
    spec = DATASETS[dataset]
    match = _SPLIT.fullmatch(split)
    if not match:
        raise DataError(
            f'split = "{split}" is not a split; write "train", "train[:100]" or "train[10%:20%]"'
        )
    name = match[1]
    _quiet()
    local = Path(os.path.expanduser(path))
    if path and os.path.exists(local):  # False also for what can be no path
        table, files = _read_local(spec, local, name)
        where = path
    else:
        table, where = _read_hub(spec, path, name)
        files = []
    label = f"{where}, split {name}"
    table = _used_columns(spec, table, ", ".join(map(str, files)) or label)
    size = table.num_rows
    numbers = range(size)[_bound(match[2], size) : _bound(match[3], size)]
    if not numbers:
        raise DataError(f'path: {where} holds no rows in split "{split}"')
    return Rows(spec, table, numbers, files, label, f"{where} ({split})")


def _bound(text: str | None, size: int) -> int | None:
    """One end of a slice of `size` rows, in rows or percent, counted from the end if negative."""
    if not text:
        return None
    return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)


def _quiet() -> None:
    """No progress bars off a terminal, and no log lines beside the one-line errors raised here."""
    import datasets

    if not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"):
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)


def _read_hub(spec: DatasetSpec, path: str, name: str) -> tuple[Dataset, str]:
    """A whole split from the hub, or from the cache of an earlier download; and where it lies."""
    import datasets

    hub_id, _, config = path.partition(":")
    if not path:
        hub_id, config = spec.hub_id, spec.hub_config
    if not looks_like_hub_id(hub_id) or Path(hub_id).suffix in FORMATS:
        raise DataError(
            f'path = "{path}" does not exist; give a folder, a .jsonl, .json or .parquet file, or '
            'a hub id "org/name"'
        )
    with hub_in_reach() as trouble:
        try:
            table = datasets.load_dataset(hub_id, config or None, split=name)
        except Exception as error:  # of an unknown split or config, the first line lists the known
            raise DataError(
                f'path: "{hub_id}" is no local path and its split "{name}" cannot be read from the '
                f"hub ({trouble or first_line(error)}); log in if it is private; without a "
                "network, give a downloaded copy's folder"
            ) from error
    return table, f"{hub_id}:{config}" if config else hub_id


def _read_local(spec: DatasetSpec, path: Path, name: str) -> tuple[Dataset, list[Path]]:
    """A whole split from a folder or a file that exists; and the files, if it has rows in files."""
    import datasets

    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(path, name), []

    files = _split_files(spec, path, name) if path.is_dir() else [path]
    for file in files:
        check_file(file)
    # `datasets` splits names at characters like "[" or "*": escape what it would take as a pattern.
    patterns = [re.sub(r"([*?\[])", r"[\1]", str(file)) for file in files]
    kind = FORMATS[files[0].suffix]
    try:
        return datasets.load_dataset(kind, data_files={"rows": patterns}, split="rows"), files
    except Exception as error:
        blame(files)
        names, cause = ", ".join(map(str, files)), first_line(error.__cause__ or error)
        raise DataError(f"path: {names} cannot be read: {cause}") from error


def _read_saved(path: Path, name: str) -> Dataset:
    """A whole split of a `save_to_disk` folder."""
    import datasets

    try:
        listed = path / "dataset_dict.json"
        if not listed.is_file():
            check_saved(path)
            saved = datasets.load_from_disk(str(path))
        else:
            splits = json.loads(listed.read_text(encoding="utf-8"))["splits"]
            if name not in splits:
                raise _no_split(path, name, list(map(str, splits)))
            check_saved(path / name)  # a split's name is `\w.`, so it stays in the folder
            saved = datasets.load_from_disk(str(path / name))
        # Arrow trusts the file's offsets and would follow wrong ones anywhere in memory.
        saved.data.validate(full=True)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"path: the save_to_disk folder {path} cannot be read ({first_line(error)})"
        ) from error
    return saved


def _split_files(spec: DatasetSpec, folder: Path, name: str) -> list[Path]:
    """Choose the files of one split by name; see `load_rows` for the rule."""
    subfolders = {".", "data", spec.hub_config or "."}  # the latter two as hub snapshots do
    found = [f for sub in sorted(subfolders) for f in sorted((folder / sub).glob("*.*"))]
    every = [f for f in found if f.suffix in FORMATS and f.name != "dataset_infos.json"]
    mine = [f for f in every if _split_name(f) == name]
    # One folder's one format: a train.jsonl beside its own train.parquet must not count twice.
    if len({(f.parent, f.suffix) for f in mine}) > 1:
        shown = ", ".join(map(str, mine[:4]))
        raise DataError(
            f'path: {folder} holds split "{name}" more than once ({shown}); give the file itself'
        )
    if not mine and len(every) == 1 and name == "train":
        return every
    if not mine:
        raise _no_split(folder, name, sorted({_split_name(f) for f in every}))
    return mine


def _no_split(folder: Path, name: str, known: list[str]) -> DataError:
    if not known:
        return DataError(
            f"path: {folder} holds no data; it must be a save_to_disk folder or hold "
            f"{name}.jsonl, {name}.json or {name}.parquet"
        )
    shown = ", ".join(f'"{split}"' for split in known)
    return DataError(f'split = "{name}" is not in {folder}; it holds {shown}')


def _split_name(file: Path) -> str:
    """`train.jsonl` -> "train", `train-00003-of-00120.parquet` -> "train"."""
    return file.stem.split("-")[0]


def _used_columns(spec: DatasetSpec, table: Dataset, where: str) -> Dataset:
    """Keep the columns that the data set reads. Raises DataError for one that is missing."""
    have = table.column_names
    for wanted in spec.columns:
        if not set(wanted.split("|")) & set(have):
            shown = " or ".join(f"'{name}'" for name in wanted.split("|"))
            raise DataError(
                f"path: {where} has no column {shown}, which dataset {spec.name} needs; it has "
                f"{', '.join(repr(name) for name in have) or 'none'}"
            )
    used = [name for wanted in spec.columns for name in wanted.split("|")]
    names = [n for n in (*used, *spec.optional_columns) if n in have]
    for name in names:
        if kind := _decoded(table.features[name]):
            raise DataError(
                f"path: {where}: column '{name}' holds {kind}, which names files to open; wanted "
                "text"
            )
    # A save_to_disk folder may ask for tensors instead of Python values.
    return table.select_columns(names).with_format(None)


def _decoded(feature: Any) -> str:
    """The name of a type such as Image, whose values `datasets` makes of other files, if any."""
    if isinstance(feature, Mapping):
        parts = list(feature.values())
    elif isinstance(feature, (list, tuple)):
        parts = list(feature)
    elif hasattr(feature, "decode_example") and type(feature).__name__ != "Json":
        return type(feature).__name__
    else:
        inner = getattr(feature, "feature", None)  # of a list
        parts = [] if inner is None else [inner]
    return next(filter(None, map(_decoded, parts)), "")
