"""Read and write slices of tensors in safetensors files, for checkpoints and Hugging Face folders.

Each rank saves the slices that it holds. A rank of another world, with other shards, copies the
parts of each file that overlap with its own slices. No rank ever holds a whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from opd_titan.checkpoint.publish import name_file_in_errors, sync_to_disk
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ModelError, first_line

# The place of a slice in the whole tensor: a range for each dimension.
Box = tuple[range, ...]

# The largest file of a checkpoint. On a GPU, this much is copied to the host at a time.
FILE_BYTES = 1024**3


class LocalSlice(NamedTuple):
    """The slice of a tensor that this rank holds, and its place."""

    values: Tensor
    box: Box


class FileSlice(NamedTuple):
    """The slice of a tensor that a safetensors file contains.

    Attributes:
        key: its name in the file.
        dtype: safetensors' name for it, such as "BF16".
    """

    path: Path
    key: str
    dtype: str
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.box))


def local_slice(tensor: Tensor) -> LocalSlice:
    """Return the slice of a plain tensor (all of it) or DTensor that this rank holds."""
    assert not tensor.is_meta, "allocate the model before its weights are read or saved"
    if not isinstance(tensor, DTensor):
        return LocalSlice(tensor.detach(), _box(tensor.shape, (0,) * tensor.dim()))
    local = tensor.to_local().detach()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    assert tuple(local.shape) == tuple(shape), f"local {local.shape}, computed {shape}"
    return LocalSlice(local, _box(shape, offset))


def _box(shape: Sequence[int], offset: Sequence[int]) -> Box:
    return tuple(range(start, start + size) for start, size in zip(offset, shape, strict=True))


def part_of(tensor: Any, box: Box, whole: Box | None = None) -> Any:
    """Return the part of a tensor in `box`.

    Args:
        tensor: a tensor, or a slice of a safetensors file.
        whole: the box that the tensor fills, if it is a slice itself.
    """
    firsts = [r.start for r in whole] if whole is not None else [0] * len(box)
    return tensor[tuple(slice(r.start - f, r.stop - f) for r, f in zip(box, firsts, strict=True))]


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
    """Return whether this rank saves its slice.

    If several ranks hold the same slice, they take turns from tensor to tensor.
    """
    if not isinstance(tensor, DTensor):
        return number % dist.get_world_size() == dist.get_rank()
    mesh = tensor.device_mesh
    return all(
        mesh.get_local_rank(dim) == number % mesh.size(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


def write_slices(folder: Path, slices: Mapping[str, LocalSlice]) -> list[str]:
    """Write this rank's slices to files. They are on the disk on return.

    The key of a slice is its tensor's name and its offset, such as `model.norm.weight@16`.

    Returns:
        The names of the files.

    Raises:
        OSError: a file cannot be written.
    """
    tensors = {f"{n}@{','.join(str(r.start) for r in box)}": t for n, (t, box) in slices.items()}
    plan = split_state_dict_into_shards_factory(
        {key: values.nbytes for key, values in tensors.items()},
        get_storage_size=int,  # the values are sizes
        filename_pattern=f"rank-{dist.get_rank()}{{suffix}}.safetensors",
        max_shard_size=FILE_BYTES,
    )
    for name, keys in plan.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key].cpu().contiguous() for key in keys})
    return list(plan.filename_to_tensors)


def read_index(paths: Sequence[Path]) -> dict[str, list[FileSlice]]:
    """Return all slices of each tensor in files of `write_slices`. Only headers are read.

    Raises:
        ModelError: a file is not a safetensors file.
        ValueError: a file has other keys, or a tensor lacks a slice.
    """
    index: dict[str, list[FileSlice]] = defaultdict(list)
    for path in paths:
        for key, part in read_header(path).items():
            name, _, at = key.rpartition("@")
            offset = list(map(int, at.split(","))) if at else []
            index[name].append(part._replace(box=_box(part.shape, offset)))
        beat()
    for name, parts in index.items():
        # Slices do not overlap: the ranks save every value once.
        if sum(prod(part.shape) for part in parts) != prod(whole_shape(parts)):
            raise ValueError(f"slices of {name} are missing")
    return dict(index)


def whole_shape(parts: Sequence[FileSlice]) -> tuple[int, ...]:
    """Return the shape of the tensor that consists of these slices."""
    return tuple(
        max(r.stop for r in ranges) for ranges in zip(*(p.box for p in parts), strict=True)
    )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, and wait until it is on the disk.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    with name_file_in_errors(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets only the owner read its files
    sync_to_disk(path)
    beat()


def read_header(path: Path) -> dict[str, FileSlice]:
    """Return the tensors of a safetensors file by key, each as a whole tensor.

    Raises:
        ModelError: it is not a safetensors file.
    """
    found = {}
    with open_safetensors(path) as file:
        for key in file.keys():
            stored = file.get_slice(key)
            shape = stored.get_shape()
            found[key] = FileSlice(path, key, stored.get_dtype(), _box(shape, [0] * len(shape)))
    return found


@torch.no_grad()
def read_slices(tensors: Mapping[str, Tensor], stored: Mapping[str, Sequence[FileSlice]]) -> None:
    """Copy the values of this rank's slices from files into the tensors, cast to their dtypes.

    Args:
        tensors: plain tensors or DTensors.
        stored: all slices of each of them.

    Raises:
        ModelError: a file is not a safetensors file.
    """
    copies: dict[Path, list[tuple[FileSlice, Box, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        local, box = local_slice(tensor)
        for part in stored[name]:
            shared = tuple(
                range(max(a.start, b.start), min(a.stop, b.stop))
                for a, b in zip(box, part.box, strict=True)
            )
            if all(shared):  # no range is empty
                copies[part.path].append((part, shared, part_of(local, shared, box)))
    for path, entries in copies.items():
        # Only one file is open at a time, because closing it unmaps its pages.
        with open_safetensors(path) as file:
            for part, shared, target in entries:
                target.copy_(part_of(file.get_slice(part.key), shared, part.box))
                beat()


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ModelError: it is not a safetensors file.
    """
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # SafetensorError, OSError, mmap's ValueError
        raise ModelError(
            f"{path}: is truncated or not a safetensors file ({first_line(error)})"
        ) from error
    with file:
        yield file
