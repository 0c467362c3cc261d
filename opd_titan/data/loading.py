"""Find the rows of a data set, on disk or on the hub.

The message of a DataError from this module begins with the key; the caller adds its table.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_titan.data.files import Row, digest_of_files, is_plain_name, read_json
from opd_titan.data.hub import hub_in_reach, looks_like_hub_id
from opd_titan.data.sources import DATASETS, DatasetSpec, Record, RowError
from opd_titan.distributed.launched import launched_rank
from opd_titan.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT = re.compile(r"([\w.]+)(?:\[(-?\d{1,12}%?)?:(-?\d{1,12}%?)?\])?")


@dataclass(frozen=True)
class Rows:
    """The rows of one split or of a slice of it. No row is read before `records` is called.

    Attributes:
        where: the path or hub id, for messages.
        split: the split as the user wrote it.
        bounds: the two ends of its slice; "" for an end that is not given.
        read: yields each row of the whole split with its place.
        files: the files that `read` reads; empty for a hub set.
        version: a hash of a hub set's revision and configuration.
    """

    spec: DatasetSpec
    where: str
    split: str
    bounds: tuple[str, str]
    read: Callable[[], Iterator[tuple[str, Row]]]
    files: Sequence[Path] = ()
    version: str = ""

    @property
    def source(self) -> str:
        return f"{self.where} ({self.split})"

    def fingerprint(self) -> str:
        """Return a hash that changes when the rows do."""
        kinds = [file.suffix for file in self.files]
        return self.version or f"{digest_of_files(self.files)} {kinds}"

    def records(self) -> Iterator[tuple[int, str, Record]]:
        """Yield the number of each row in the split (from 0), its place, and its record.

        Raises:
            DataError: names the place of the row that cannot be used.
        """
        columns = self.spec.all_columns
        numbers = self._numbers()
        number = None
        for number, (place, row) in islice(enumerate(self.read()), numbers.start, numbers.stop):
            if number == numbers.start:
                _check_columns(self.spec, list(row), place)
            try:
                record = self.spec.to_record({n: row[n] for n in columns if n in row})
            except RowError as error:
                raise row_error(place, f"{error} (dataset {self.spec.name})") from error
            yield number, place, record
        if number is None:
            raise DataError(f'path: {self.where} has no rows in split "{self.split}"')

    def place(self, number: int) -> str:
        """Return the place of the row with this number."""
        return next(place for n, (place, _) in enumerate(self.read()) if n == number)

    def _numbers(self) -> range:
        relative = any(c in bound for bound in self.bounds for c in "-%")
        size = sum(1 for _ in self.read()) if relative else sys.maxsize
        first, last = (_bound(bound, size) for bound in self.bounds)
        return range(size)[first:last]


def row_error(place: str, message: object) -> DataError:
    """Return the one-line error for the row at this place."""
    return DataError(f"path: {place}: {' '.join(str(message).split())}")


def load_rows(dataset: str, path: str, split: str) -> Rows:
    """Find the rows of a data set of `sources.DATASETS`.

    Args:
        path: "" for the set's own hub id, or one of
            - a `save_to_disk` folder; a plain Dataset is used for any split;
            - a folder with `<split>.jsonl`, `.json`, `.parquet` or `<split>-*` shards, in it or in
              its `data/` (for gsm8k also `main/`); a single data file is used for "train";
            - a data file, which is used for any split;
            - a hub id, "org/name" or "org/name:config".
        split: one split or a slice of it: "train", "train[:100]", "train[10%:20%]".

    Raises:
        DataError: names the key, and the file if there is one.
    """
    spec = DATASETS[dataset]
    match = _SPLIT.fullmatch(split)
    if not match:
        raise DataError(
            f'split = "{split}" is not a split; write "train", "train[:100]" or "train[10%:20%]"'
        )
    name, bounds = match[1], (match[2] or "", match[3] or "")
    local = Path(os.path.expanduser(path))
    if not path or not os.path.exists(local):  # False also for text that cannot be a path
        table, where = _load_hub(spec, path, name)
        read = partial(_read_table, spec, table, f"{where}, split {name}")
        return Rows(spec, where, split, bounds, read, version=table._fingerprint)
    if any((local / file).is_file() for file in ("dataset_dict.json", "state.json")):
        folder = _saved_folder(local, name)
        read = partial(_read_saved, spec, folder, f"{path}, split {name}")
        files = sorted(file for file in folder.iterdir() if file.is_file())
    else:
        files = _split_files(spec, local, name) if local.is_dir() else [local]
        if files[0].suffix not in SUFFIXES:
            raise DataError(f"path: {local} must end in one of {', '.join(SUFFIXES)}")
        read = partial(_read_files, spec, files)
    return Rows(spec, path, split, bounds, read, files)


def _bound(text: str, size: int) -> int | None:
    """Return one end of a slice of `size` rows, given in rows or percent."""
    if not text:
        return None
    return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)


def _read_files(spec: DatasetSpec, files: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    for file in files:
        if file.suffix == ".parquet":
            yield from _read_parquet(spec, file)
        else:
            for place, row in read_json(file):
                yield f"{file}, {place}", row


def _read_parquet(spec: DatasetSpec, file: Path) -> Iterator[tuple[str, Row]]:
    import datasets

    _silence()
    pattern = re.sub(r"([*?\[])", r"[\1]", str(file))  # a pattern that matches only this name
    try:
        # Streaming avoids the cache of `datasets`, which may have a copy of an older file.
        table = datasets.load_dataset(
            "parquet", data_files={"rows": [pattern]}, split="rows", streaming=True
        )
        yield from _read_table(spec, table, str(file))
    except DataError:
        raise
    except Exception as error:  # a broken file raises one of many classes
        raise DataError(f"path: {file} cannot be read: {first_line(error)}") from error


def _read_table(
    spec: DatasetSpec, table: Dataset | IterableDataset, label: str
) -> Iterator[tuple[str, Row]]:
    _check_columns(spec, table.column_names, label)
    names = [name for name in spec.all_columns if name in table.column_names]
    for name in names:
        if kind := _read_from_files(table.features[name]):
            raise DataError(
                f"path: {label}: column '{name}' contains {kind}, which names files to open; "
                "wanted text"
            )
    table = table.select_columns(names)
    try:
        # A save_to_disk folder may ask for tensors instead of Python values.
        for number, row in enumerate(table.with_format(None), 1):
            yield f"{label}, row {number}", row
    except UnicodeDecodeError as error:  # Arrow does not check text earlier
        raise DataError(f"path: {label}: text that is not UTF-8") from error


def _read_saved(spec: DatasetSpec, folder: Path, label: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name in (entry["filename"] for entry in state["_data_files"]):
            if not is_plain_name(name):
                raise DataError(
                    f"path: {folder / 'state.json'} names {name!r}; expected the name of a file "
                    "beside it"
                )
        _silence()
        table = datasets.load_from_disk(str(folder))
        # Otherwise wrong offsets in the file would make Arrow read any place in memory.
        table.data.validate(full=True)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"path: the save_to_disk folder {folder} cannot be read ({first_line(error)})"
        ) from error
    yield from _read_table(spec, table, label)


def _saved_folder(path: Path, name: str) -> Path:
    """Return the folder of one split of a `save_to_disk` folder."""
    listed = path / "dataset_dict.json"
    if not listed.is_file():
        return path
    try:
        splits = list(map(str, json.loads(listed.read_text(encoding="utf-8"))["splits"]))
    except Exception as error:
        raise DataError(f"path: {listed} cannot be read ({first_line(error)})") from error
    if name not in splits or not (path / name).is_dir():  # a split name has no "/"
        raise _no_split(path, name, splits)
    return path / name


def _load_hub(spec: DatasetSpec, path: str, name: str) -> tuple[Dataset, str]:
    """Load a split from the hub, or from an earlier download. Return it with its hub id."""
    import datasets

    hub_id, _, config = path.partition(":")
    if not path:
        hub_id, config = spec.hub_id, spec.hub_config
    if not looks_like_hub_id(hub_id) or Path(hub_id).suffix in SUFFIXES:
        raise DataError(
            f'path = "{path}" does not exist; give a folder, a .jsonl, .json or .parquet file, or '
            'a hub id "org/name"'
        )
    _silence()
    with hub_in_reach() as trouble:
        try:
            table = datasets.load_dataset(hub_id, config or None, split=name)
        except Exception as error:  # for a wrong split or config, its first line lists the others
            raise DataError(
                f'path: "{hub_id}" is not a local path, and its split "{name}" cannot be read from '
                f"the hub ({trouble or first_line(error)}); log in if it is private; without a "
                "network, give the folder of a downloaded copy"
            ) from error
    return table, f"{hub_id}:{config}" if config else hub_id


def _silence() -> None:
    """Turn off the log of `datasets`, and its progress bars unless they show in a terminal."""
    import datasets

    if not (sys.stderr.isatty() and launched_rank() == 0):
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)


def _split_files(spec: DatasetSpec, folder: Path, name: str) -> list[Path]:
    """Choose the files of one split by name; see `load_rows` for the rule."""
    subfolders = {".", "data", spec.hub_config or "."}  # hub snapshots have the last two
    found = [f for sub in sorted(subfolders) for f in sorted((folder / sub).glob("*.*"))]
    every = [f for f in found if f.suffix in SUFFIXES and f.name != "dataset_infos.json"]
    mine = [f for f in every if _split_name(f) == name]
    # A train.jsonl and a train.parquet with the same rows must not count twice.
    if len({(f.parent, f.suffix) for f in mine}) > 1:
        shown = ", ".join(map(str, mine[:4]))
        raise DataError(
            f'path: {folder} has split "{name}" more than once ({shown}); give the file itself'
        )
    if not mine and len(every) == 1 and name == "train":
        return every
    if not mine:
        raise _no_split(folder, name, sorted({_split_name(f) for f in every}))
    return mine


def _no_split(folder: Path, name: str, known: list[str]) -> DataError:
    if not known:
        return DataError(
            f"path: {folder} contains no data; it must be a save_to_disk folder or contain "
            f"{name}.jsonl, {name}.json or {name}.parquet"
        )
    shown = ", ".join(f'"{split}"' for split in known)
    return DataError(f'split = "{name}" is not in {folder}; it has {shown}')


def _split_name(file: Path) -> str:
    """`train.jsonl` -> "train", `train-00003-of-00120.parquet` -> "train"."""
    return file.stem.split("-")[0]


def _check_columns(spec: DatasetSpec, have: Sequence[str], place: str) -> None:
    for wanted in spec.columns:
        if not set(wanted.split("|")) & set(have):
            shown = " or ".join(f"'{name}'" for name in wanted.split("|"))
            raise DataError(
                f"path: {place} has no column {shown}, which dataset {spec.name} needs; it has "
                f"{', '.join(map(repr, have)) or 'none'}"
            )


def _read_from_files(feature: Any) -> str:
    """Return the name of a type such as Image, which `datasets` reads from other files; else ""."""
    if isinstance(feature, Mapping):
        parts = list(feature.values())
    elif isinstance(feature, (list, tuple)):
        parts = list(feature)
    elif hasattr(feature, "decode_example") and type(feature).__name__ != "Json":
        return type(feature).__name__
    else:
        parts = [feature.feature] if hasattr(feature, "feature") else []  # of a list
    return next(filter(None, map(_read_from_files, parts)), "")
