"""Slices of tensors in safetensors files: what checkpoints and Hugging Face folders share.

Each rank saves the slices that it holds. A rank of another world, with other shards, copies from
each file what overlaps with its own slices. No rank ever holds a whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from opd_titan.checkpoint.faults import name_file_in_errors
from opd_titan.checkpoint.publish import sync_to_disk
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ModelError, first_line

Shape = tuple[int, ...]

# A file of a checkpoint is about as large. On a GPU, this much is copied to the host at a time.
FILE_BYTES = 1024**3


class LocalSlice(NamedTuple):
    """The slice of a tensor that this rank holds, and its offset in the whole tensor."""

    values: Tensor
    offset: Shape


class FileSlice(NamedTuple):
    """The slice of a tensor that a safetensors file holds, under the tensor's name."""

    path: Path
    offset: Shape
    shape: Shape


def local_slice(tensor: Tensor) -> LocalSlice:
    """Return the slice of a plain tensor (all of it) or DTensor that this rank holds."""
    assert not tensor.is_meta, "allocate the model before its weights are read or saved"
    if not isinstance(tensor, DTensor):
        return LocalSlice(tensor.detach(), (0,) * tensor.dim())
    local = tensor.to_local().detach()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    assert tuple(local.shape) == tuple(shape), f"local {local.shape}, computed {shape}"
    return LocalSlice(local, tuple(offset))


def slices_to_save(tensors: Mapping[str, Tensor]) -> dict[str, LocalSlice]:
    """Return the slices that this rank saves. Together, the ranks save every value once.

    Args:
        tensors: the same names in the same order on every rank.
    """
    found = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        part = local_slice(tensor)
        if part.values.numel() and _saves(tensor, number):
            found[name] = part
    return found


def _saves(tensor: Tensor, number: int) -> bool:
    """Return whether this rank saves its slice, of all ranks that hold the same one.

    They take turns from tensor to tensor.
    """
    if not isinstance(tensor, DTensor):
        return number % dist.get_world_size() == dist.get_rank()
    mesh = tensor.device_mesh
    return all(
        mesh.get_local_rank(dim) == number % mesh.size(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


def write_slices(folder: Path, slices: Mapping[str, LocalSlice]) -> dict[str, FileSlice]:
    """Write this rank's slices to files of about FILE_BYTES. They are on the disk on return.

    Raises:
        OSError: a file cannot be written.
    """
    files: list[list[str]] = []
    size = FILE_BYTES
    for name, part in slices.items():
        if size >= FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += part.values.nbytes
    written = {}
    for number, names in enumerate(files):
        path, content = folder / f"rank-{dist.get_rank()}-{number}.safetensors", {}
        for name in names:
            content[name] = slices[name].values.cpu().contiguous()
            written[name] = FileSlice(path, slices[name].offset, tuple(content[name].shape))
            beat()
        write_tensors(path, content)
    return written


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, and wait until it is on the disk.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with name_file_in_errors(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets only the owner read its files
    sync_to_disk(path)
    beat()


@torch.no_grad()
def read_slices(tensors: Mapping[str, Tensor], stored: Mapping[str, Sequence[FileSlice]]) -> None:
    """Copy the values of this rank's slices from files into them, cast to their dtypes.

    Args:
        tensors: plain tensors or DTensors, by the names that they have in the files.
        stored: all slices of each tensor.
    """
    copies: dict[Path, list[tuple[str, Tensor, tuple[slice, ...]]]] = defaultdict(list)
    for name, tensor in tensors.items():
        local, offset = local_slice(tensor)
        for part in stored[name]:
            starts = [max(pair) for pair in zip(offset, part.offset, strict=True)]
            mine, theirs = ends(offset, local.shape), ends(part.offset, part.shape)
            stops = [min(pair) for pair in zip(mine, theirs, strict=True)]
            if all(start < stop for start, stop in zip(starts, stops, strict=True)):
                target = local[_window(starts, stops, offset)]
                copies[part.path].append((name, target, _window(starts, stops, part.offset)))
    for path, entries in copies.items():
        # One file is open at a time: closing it gives back the pages that were mapped.
        with open_safetensors(path) as file:
            for name, target, window in entries:
                target.copy_(file.get_slice(name)[window])
                beat()


def ends(offset: Shape, shape: Sequence[int]) -> list[int]:
    """Return where a slice ends, in each dimension of the whole tensor."""
    return [start + size for start, size in zip(offset, shape, strict=True)]


def _window(starts: list[int], stops: list[int], offset: Shape) -> tuple[slice, ...]:
    """Return the range from `starts` to `stops`, counted from `offset`."""
    triples = zip(starts, stops, offset, strict=True)
    return tuple(slice(start - first, stop - first) for start, stop, first in triples)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ModelError: it is not one.
    """
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # SafetensorError, OSError, mmap's ValueError
        raise ModelError(
            f"{path}: is truncated or not a safetensors file ({first_line(error)})"
        ) from error
    with file:
        yield file
