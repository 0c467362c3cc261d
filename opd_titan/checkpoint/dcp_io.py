"""DCP's reader and writer, made safe: no pickle that could run code, no fault that hangs a rank.

DCP keeps its metadata as a pickle, and its planner unpickles whatever is not a tensor. Here both
read the few classes that a checkpoint is made of and nothing else; tensors DCP itself reads with
`weights_only=True` (torch 2.10 to 2.15).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    filesystem,
    metadata,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from opd_titan.checkpoint.faults import naming
from opd_titan.data.files import is_plain_name
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import CheckpointError, first_line, reason

METADATA = ".metadata"
_METADATA_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)


def _enum_member(cls: Any, name: Any) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle a member of an enum."""
    if cls is not metadata._MEM_FORMAT_ENCODING or not isinstance(name, str):
        raise pickle.UnpicklingError(f"it looks up {name!r}, which no checkpoint does")
    return cls[name]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _enum_member,
    **{(metadata.__name__, name): getattr(metadata, name) for name in _METADATA_CLASSES},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the folder once was, which nobody asks. The second is Python 3.13's name of it.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


_BUILT = {
    *(getattr(metadata, name) for name in _METADATA_CLASSES if not name.startswith("_")),
    filesystem._StorageInfo,
}


# In Python, for its `load_build`: the C one calls no method for it.
class _MetadataUnpickler(pickle._Unpickler):
    stack: list[Any]  # which its type stubs leave out, and `load_build`
    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Set an object's attributes: an instance's, or a pickle could change the class itself."""
        if type(self.stack[-2]) not in _BUILT:
            raise pickle.UnpicklingError("it changes what it has not made")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]  # of this class alone

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has")


def read_metadata(folder: Path) -> Metadata:
    """What DCP knows about a checkpoint, read without running anything that it may hold.

    Raises:
        CheckpointError: it is missing, damaged, or something else than a checkpoint's metadata.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
    except Exception as error:  # an unpickler on damaged bytes may raise almost anything
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(found, Metadata) or not _is_well_formed(found):
        raise CheckpointError(f"{path}: cannot be read (it is no metadata of a checkpoint)")
    return found


def _is_well_formed(found: Metadata) -> bool:
    entries, places = found.state_dict_metadata, found.storage_data
    kinds = (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata)
    return (
        isinstance(entries, dict)
        and isinstance(places, dict)
        and all(type(name) is str and isinstance(e, kinds) for name, e in entries.items())
        and all(_is_well_placed(place) for place in places.values())
    )


def _is_well_placed(place: Any) -> bool:
    """Only files of the checkpoint's own folder, read as they are."""
    return (
        isinstance(place, filesystem._StorageInfo)
        and is_plain_name(place.relative_path)
        and type(place.offset) is int
        and type(place.length) is int
        and not place.transform_descriptors
    )


class Reader(FileSystemReader):
    """Reads a checkpoint. Raises CheckpointError where its metadata cannot be trusted."""

    def read_metadata(self, rank: int | None = None) -> Metadata:
        found = read_metadata(Path(self.path))
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class BeatingPlanner(DefaultSavePlanner):
    """Says before each tensor that the work goes on."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        beat()
        return super().resolve_data(write_item)


class LoadPlanner(DefaultLoadPlanner):
    """Takes numbers, strings and their containers for what is not a tensor, and no other class."""

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        beat()
        super().commit_tensor(read_item, tensor)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            content = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            # Its message advises to switch this off.
            text = f"{name} holds more than numbers, strings and their containers"
            raise pickle.UnpicklingError(text) from None
        set_element(self.original_state_dict, self.mappings[name], content)


class Writer(FileSystemWriter):
    """Writes a checkpoint, and keeps a fault of storage to itself until it is asked.

    DCP would send the fault to the other ranks with its traceback, which not every version of
    Python and torch can pickle; then the others would wait for ever.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _NamedFiles()
        self._fault: OSError | None = None

    def raise_fault(self) -> None:
        """Raise the OSError that this rank met, if any."""
        if self._fault is not None:
            raise self._fault

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with self._keeping_faults():
            return super().prepare_local_plan(plan)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with self._keeping_faults():
            return super().write_data(plan, planner)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._keeping_faults():
            super().finish(metadata, results)

    @contextmanager
    def _keeping_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._fault = self._fault or error


class _NamedFiles(filesystem.FileSystem):
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with naming(path), super().create_stream(path, mode) as stream:
            yield stream
