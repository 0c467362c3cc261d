"""Checkpoints for exact resume, on any number of ranks and in any layout.

    step-N/
        rank-R-K.safetensors   slices of the weights (fp32) and of the optimizer state
        index.json             the slices of each tensor: file, offset, shape
        train_state.json       everything else that a run resumes from
        checksums.json         size and CRC-32 of every other file

Each rank writes the slices that it holds to `step-N.tmp`. When all have, rank 0 adds the JSON files
and renames the folder, so that a folder named `step-N` is complete. The sampler's random numbers
have no state to save.

A storage fault does not end the run: it is logged, the last good checkpoint stays, and the next
save tries again. Callers that need a step to be on the disk ask `secured` or `require`.

torch.distributed.checkpoint can write safetensors too (HuggingFaceStorageWriter, torch 2.13) and
reshards them. It is not used because it needs twice the state's size in host memory to write it
(2.0 GiB for 1.0 GiB; `save_file` needs none), and because it has no index: where a file is missing,
it loads the others and reports nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_titan.checkpoint.manifest import Entry, describe, write_manifest
from opd_titan.checkpoint.publish import publish, tmp_of, write_file
from opd_titan.checkpoint.slices import (
    FileSlice,
    LocalSlice,
    Shape,
    ends,
    read_slices,
    slices_to_save,
    write_slices,
)
from opd_titan.checkpoint.steps import MANIFEST, STATE, make_tmp, prune, require_intact
from opd_titan.data.files import is_plain_name
from opd_titan.distributed.agreement import call_on_rank_0, raise_on_all_ranks
from opd_titan.errors import CheckpointError, StorageError, first_line

logger = logging.getLogger("opd_titan")

INDEX = "index.json"
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of the names in the index

Index = dict[str, list[FileSlice]]
# What one rank has written: its slices, and the checksums of its files.
Written = tuple[dict[str, FileSlice], dict[str, Entry]]


def inspect_checkpoint(folder: Path, step: int, model: nn.Module) -> dict[str, Any]:
    """Return the train state of a checkpoint, without reading a tensor.

    Args:
        model: may be on the meta device.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    path = folder / f"step-{step}"
    _read_index(path, model)
    return _read_json(path / STATE)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights, and nothing else, into the model in its dtype. All ranks call.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    require_intact(path)
    with raise_on_all_ranks():
        read_slices(_weights(model), _read_index(path, model))


class Checkpointer:
    """Saves and loads `<folder>/step-N/`.

    Args:
        keep_latest_k: older checkpoints are deleted once a newer one is complete; 0 keeps all.
        background: write while training goes on (the tensors are copied to host memory first).
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        keep_latest_k: int,
        background: bool,
    ) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.keep_latest_k = keep_latest_k
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        # The save in the background: its step, its train state, and what the thread will return.
        self._pending: tuple[int, str, Future[Written]] | None = None
        self._secured: int | None = None
        self._fault: StorageError | None = None

    def save(
        self, step: int, train_state: dict[str, Any], written: Callable[[], None] = lambda: None
    ) -> bool:
        """Write one checkpoint, or start writing it when in background mode. All ranks call.

        A storage fault on any rank is logged as an error, and nothing of this step is left.

        Args:
            written: called when all tensors are written and nothing is published yet; in background
                mode when writing has begun; not called after a failure.

        Returns:
            Whether the checkpoint is written, or being written.
        """
        self.wait()
        text = json.dumps(train_state)
        with self._log_faults(step):
            tmp = make_tmp(self.folder / f"step-{step}")
            slices = slices_to_save(self._tensors())
            if self._thread is None:
                with raise_on_all_ranks():
                    found = _write(tmp, slices)
                written()
                self._publish(step, text, found)
            else:
                copies = {
                    name: LocalSlice(part.values.to("cpu", copy=True), part.offset)
                    for name, part in slices.items()
                }
                self._pending = step, text, self._thread.submit(_write, tmp, copies)
                written()
        return self._pending is not None or self._fault is None

    def poll(self) -> None:
        """Complete a background save if all ranks have written their part. All ranks call."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[-1].done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done:
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way. All ranks call."""
        if self._pending is not None:
            step, text, future = self._pending
            self._pending = None
            with self._log_faults(step):
                with raise_on_all_ranks():
                    found = future.result()
                self._publish(step, text, found)

    def secured(self) -> int | None:
        """Return the newest step that was loaded or is on the disk. Waits. All ranks call."""
        self.wait()
        return self._secured

    def require(self, step: int) -> None:
        """Make sure that a step is on the disk. All ranks call.

        Raises:
            StorageError: it is not; says why its save failed.
        """
        if self.secured() != step:
            raise self._fault or StorageError(f"{self.folder}: step {step} was not saved")

    def load(self, step: int) -> None:
        """Load weights and optimizer state in place. `inspect_checkpoint` returns the rest.

        The optimizer keeps its own settings (betas, weight decay, ...), which are the recipe's.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        path = self.folder / f"step-{step}"
        with raise_on_all_ranks():
            index = _read_index(path, self.model)
            self._allocate_optimizer_state(index)
            read_slices(self._tensors(), index)
        # The run that published it may have been killed before it could delete older ones.
        prune(self.folder, step, self.keep_latest_k)
        self._secured = step

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved, by its name in the index."""
        tensors = _weights(self.model)
        for name, parameter in list(tensors.items()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{OPTIMIZER}{name.removeprefix(MODEL)}.{key}"] = value
        return tensors

    def _allocate_optimizer_state(self, index: Index) -> None:
        """Give the optimizer the state that the checkpoint has, with any values."""
        weights = _weights(self.model)
        state: dict[Tensor, dict[str, Tensor]] = {}
        for full_name in (n for n in index if n.startswith(OPTIMIZER)):
            name, _, key = full_name.removeprefix(OPTIMIZER).rpartition(".")
            parameter = weights[MODEL + name]
            held = self.optimizer.state.get(parameter, {}).get(key)
            if held is None:
                # As AdamW has it: two moments like the parameter, and a scalar for the step.
                moment = _whole_shape(index[full_name]) == tuple(parameter.shape)
                held = torch.empty_like(parameter) if moment else torch.tensor(0.0)
            state.setdefault(parameter, {})[key] = held
        own = self.optimizer.state_dict()
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        own["state"] = {i: state[p] for i, p in enumerate(ordered) if p in state}
        self.optimizer.load_state_dict(own)

    def _publish(self, step: int, train_state: str, written: Written) -> None:
        """Complete the folder, which all ranks have written to, and rename it. All ranks call."""
        parts: list[Any] | None = None
        if dist.get_rank() == 0:
            parts = [None] * dist.get_world_size()
        dist.gather_object(written, parts)

        def complete() -> None:
            assert parts is not None
            final = self.folder / f"step-{step}"
            tmp = tmp_of(final)
            _write_index(tmp, [slices for slices, _ in parts])
            write_file(tmp / STATE, train_state)
            files = describe(tmp, [INDEX, STATE])
            for _, own in parts:
                files |= own
            write_manifest(tmp / MANIFEST, files)
            publish(final)

        call_on_rank_0(complete)
        prune(self.folder, step, self.keep_latest_k)
        self._secured, self._fault = step, None

    @contextmanager
    def _log_faults(self, step: int) -> Iterator[None]:
        """Log a StorageError, which all ranks have raised, and delete what the save has left."""
        try:
            yield
        except StorageError as error:
            tmp = tmp_of(self.folder / f"step-{step}")
            call_on_rank_0(lambda: shutil.rmtree(tmp, ignore_errors=True))
            safe = "none is safe yet"
            if self._secured is not None:
                safe = f"step {self._secured} is the newest that is safe"
            self._fault = StorageError(f"checkpoint of step {step} not saved: {error}; {safe}")
            self._fault.__cause__ = error
            logger.error("Storage: %s", self._fault)


def _write(tmp: Path, slices: dict[str, LocalSlice]) -> Written:
    """Write this rank's slices. May run in a thread.

    Raises:
        OSError: a file cannot be written.
    """
    found = write_slices(tmp, slices)
    return found, describe(tmp, {part.path.name for part in found.values()})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their names in the index, a tied one under its first name.

    Under FSDP they are the sharded ones: `state_dict` reshards what a forward has gathered.
    """
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {MODEL + n: t for n, t in tensors.items() if first.setdefault(id(t), n) == n}


def _write_index(folder: Path, parts: list[dict[str, FileSlice]]) -> None:
    by_offset: dict[str, dict[Shape, Any]] = {}
    for part in parts:
        for name, (path, offset, shape) in part.items():
            by_offset.setdefault(name, {})[offset] = [path.name, offset, shape]
    slices = {name: list(found.values()) for name, found in by_offset.items()}
    write_file(folder / INDEX, json.dumps(slices))


def _read_index(path: Path, model: nn.Module) -> Index:
    """Return the slices of each tensor of the checkpoint `step-N` at this path.

    Raises:
        CheckpointError: it is of another model or of an older version, or the index is damaged.
    """
    if not (path / INDEX).exists() and (path / ".metadata").exists():
        raise CheckpointError(
            f"{path}: was written by another version of opd_titan (0.1.0 or older, format "
            f"{_read_json(path / STATE).get('format')}: torch.distributed.checkpoint); go on with "
            f"that one, choose another job.dump_folder, or start afresh with "
            f"checkpoint.load_step = 0"
        )
    index: Index = {}
    try:
        for name, slices in _read_json(path / INDEX).items():
            if not all(is_plain_name(file) for file, _, _ in slices):
                raise ValueError("it names a file that is not beside it")
            index[name] = [FileSlice(path / f, tuple(o), tuple(s)) for f, o, s in slices]
            # Slices do not overlap: the ranks save every value once.
            if sum(prod(part.shape) for part in index[name]) != prod(_whole_shape(index[name])):
                raise ValueError(f"it lacks slices of {name}")
    except (ValueError, TypeError) as error:
        raise _unreadable(path / INDEX, error) from error
    _check_same_model(path, index, model)
    return index


def _check_same_model(path: Path, index: Index, model: nn.Module) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in _weights(model).items()}
    saved = {n: list(_whole_shape(s)) for n, s in index.items() if n.startswith(MODEL)}
    differ = [n for n in {**wanted, **saved} if saved.get(n) != wanted.get(n)]
    if differ:
        name = differ[0]
        raise CheckpointError(
            f"{path}: is of another model: {name} is {saved.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in student.hf_path ({len(differ)} tensors differ); set "
            f"student.hf_path back or choose another job.dump_folder"
        )


def _whole_shape(slices: list[FileSlice]) -> Shape:
    return tuple(map(max, zip(*(ends(part.offset, part.shape) for part in slices), strict=True)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({first_line(error)}); choose another step with "
        f"checkpoint.load_step or another job.dump_folder"
    )
