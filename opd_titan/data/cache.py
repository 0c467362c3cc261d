"""A cache of tokenized prompts on disk: written once, memory-mapped by every process.

An entry of the cache is a folder named by its key. It contains the prompts as an Arrow file, and
their counts as JSON. The folder is renamed to this name when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from opd_titan.data.files import BLOCK, cache_folder
from opd_titan.data.types import Prompt
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import reason

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("opd_titan")

PROMPTS, INFO = "prompts.arrow", "info.json"
_POLL, _PATIENCE = 0.1, 120.0  # seconds
_LEFTOVER = 86400.0  # seconds


class TokenizedRow(NamedTuple):
    """The stored fields of a prompt. `number` is the number of its row in the split."""

    number: int
    text: str
    token_ids: list[int]
    response: str | None
    answer: str | None


# Stores a batch.
Write = Callable[[Sequence[TokenizedRow]], None]
# Writes all batches in order. Returns plain JSON values to store with them.
Make = Callable[[Write], dict[str, Any]]


class Prompts(Sequence[Prompt]):
    """Prompts in a memory-mapped Arrow table. Each `Prompt` is created when it is accessed.

    Attributes:
        info: the values that `Make` returned, and `longest` and `digest`.
        first_index: added to the number of each row.
        data_set, teacher: values of every prompt.
    """

    def __init__(self, table: pa.Table, info: dict[str, Any]) -> None:
        self._columns = {name: table.column(name) for name in TokenizedRow._fields}
        self.info = info
        self.first_index, self.data_set, self.teacher = 0, "", "teacher"

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return self.info["longest"]

    @property
    def digest(self) -> str:
        """A hash of the token ids of all prompts in order."""
        return self.info["digest"]

    def __len__(self) -> int:
        return len(self._columns["number"])

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...
    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        place = range(len(self))[place]
        row = TokenizedRow(*(column[place].as_py() for column in self._columns.values()))
        index, ids = self.first_index + row.number, tuple(row.token_ids)
        return Prompt(index, row.text, ids, row.response, row.answer, self.data_set, self.teacher)

    def texts_among(self, texts: Collection[str]) -> set[str]:
        """Return the texts that are also prompts of this set."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._columns["text"]
        wanted = pa.array(list(texts), pa.large_string())
        return set(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())


def cached_prompts(key: str, make: Make) -> Prompts:
    """Return the prompts stored under a key; make and store them if there are none.

    If several processes, on one node or on a shared file system, need the same prompts, one makes
    them and the others wait. If the cache cannot be written, each process makes them in a temporary
    file.

    Args:
        key: a hash of everything that determines what `make` writes.

    Raises:
        DataError: as `make` does.
    """
    folder = cache_folder() / key
    found = _load(folder)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _turn(folder.with_suffix(".lock")) as (first, progress):
            found = _load(folder)
            if found is None and first:
                return _store(folder, make, progress)
        # If the first process has failed, all others try at once, and report the same error.
        return found or _store(folder, make, beat)
    except OSError as error:
        _warn_once(folder.parent, reason(error))
        with tempfile.TemporaryDirectory() as name:  # removed, but still mapped
            return _store(Path(name, key), make, beat)


@contextmanager
def _turn(path: Path) -> Iterator[tuple[bool, Callable[[], None]]]:
    """Hold a lock that only one process has at a time.

    If the process that has the lock makes no progress for _PATIENCE seconds, continue without the
    lock. If the file system has no locks, do not wait.

    Yields:
        Whether this process did not have to wait, and a function that records progress.
    """
    with path.open("a") as file:
        first, seen, since = True, 0, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                first = False
            except OSError:
                break
            beat()
            touched = os.fstat(file.fileno()).st_mtime_ns
            if touched != seen:
                seen, since = touched, time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                break
            time.sleep(_POLL)

        def progress() -> None:
            beat()
            os.utime(path)

        yield first, progress


def _store(folder: Path, make: Make, progress: Callable[[], None]) -> Prompts:
    """Make an entry. Return its prompts, mapped."""
    import pyarrow as pa

    for old in folder.parent.glob(f"{folder.name}.*.tmp"):  # of processes that were killed
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _LEFTOVER:
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as name:
        new = Path(name)
        with pa.OSFile(str(new / PROMPTS), "wb") as sink:
            info = _fill(sink, make, progress)
        with pa.memory_map(str(new / PROMPTS)) as file:
            stored = {"info": info, "checksum": _checksum(info, file.read_buffer())}
        (new / INFO).write_text(json.dumps(stored), encoding="utf-8")
        prompts = _load(new)
        if prompts is None:
            raise OSError(f"{new} does not contain what was written")
        if _load(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            with suppress(OSError):  # another process was faster
                new.rename(folder)
    return prompts


def _fill(sink: pa.NativeFile, make: Make, progress: Callable[[], None]) -> dict[str, Any]:
    """Write all prompts as an Arrow file. Return their counts, longest length and digest."""
    import numpy as np
    import pyarrow as pa

    types = {
        "number": pa.int64(),
        "text": pa.large_string(),
        "token_ids": pa.large_list(pa.int32()),
        "response": pa.large_string(),
        "answer": pa.large_string(),
    }
    longest, of_lengths, of_ids = (
        0,
        hashlib.blake2b(digest_size=16),
        hashlib.blake2b(digest_size=16),
    )

    def write(rows: Sequence[TokenizedRow]) -> None:
        nonlocal longest
        progress()
        if not rows:
            return
        values = zip(zip(*rows, strict=True), types.values(), strict=True)
        arrays = [pa.array(column, kind) for column, kind in values]
        writer.write_batch(pa.record_batch(arrays, names=list(types)))
        lengths = np.array([len(row.token_ids) for row in rows], np.int32)
        longest = max(longest, int(lengths.max()))
        of_lengths.update(lengths.tobytes())
        of_ids.update(arrays[2].flatten().to_numpy())

    with pa.ipc.new_file(sink, pa.schema(list(types.items()))) as writer:
        counts = make(write)
    return {**counts, "longest": longest, "digest": of_lengths.hexdigest() + of_ids.hexdigest()}


def _load(folder: Path) -> Prompts | None:
    """Map an entry. Return None if it does not exist or is damaged."""
    import pyarrow as pa

    try:
        stored = json.loads((folder / INFO).read_text(encoding="utf-8"))
        content = pa.memory_map(str(folder / PROMPTS)).read_buffer()
        if _checksum(stored["info"], content) != stored["checksum"]:
            return None
        return Prompts(pa.ipc.open_file(content).read_all(), stored["info"])
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None


def _checksum(info: dict[str, Any], content: pa.Buffer) -> int:
    checksum, view = zlib.crc32(json.dumps(info).encode()), memoryview(content)
    for start in range(0, len(view), BLOCK):
        checksum = zlib.crc32(view[start : start + BLOCK], checksum)
        beat()
    return checksum


@cache
def _warn_once(folder: Path, why: str) -> None:
    logger.warning(
        "%s cannot be written (%s): each process tokenizes all prompts at every start; set "
        "HF_DATASETS_CACHE to a writable folder",
        folder,
        why,
    )
