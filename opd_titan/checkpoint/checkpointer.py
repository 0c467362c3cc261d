"""Checkpoints for exact resume, on any number of ranks and in any layout.

    step-N/
        rank-R.safetensors     slices of the weights (fp32) and of the optimizer state
        train_state.json       everything else that a run resumes from
        checksums.json         size and CRC-32 of every other file

Each rank writes the slices that it holds to `step-N.tmp`, in several files if they are large. Then
rank 0 adds the JSON files and renames the folder, so that a folder named `step-N` is complete. The
sampler's random numbers have no state to save.

A storage fault does not end the run: it is logged, the last good checkpoint stays, and the next
save tries again. Callers that need a step to be on the disk call `secured` or `finish`.

torch.distributed.checkpoint can write safetensors too (HuggingFaceStorageWriter, torch 2.13) and
reshards them. It is not used because it needs twice the state's size in host memory to write it
(2.0 GiB for 1.0 GiB; `save_file` needs none), and because it has no checksums: if a file is
missing, it loads the others and reports nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_titan import __version__
from opd_titan.checkpoint.hf_folder import read_json
from opd_titan.checkpoint.manifest import Entry, describe
from opd_titan.checkpoint.publish import discard_tmp, fresh_tmp, publish, tmp_of, write_file
from opd_titan.checkpoint.slices import (
    FileSlice,
    LocalSlice,
    read_index,
    read_slices,
    slices_to_save,
    whole_shape,
    write_slices,
)
from opd_titan.checkpoint.steps import MANIFEST, STATE, prune, require_intact
from opd_titan.distributed.agreement import call_on_rank_0, raise_on_all_ranks
from opd_titan.errors import CheckpointError, ModelError, StorageError

logger = logging.getLogger("opd_titan")

# The version of a checkpoint's format. Checkpoints of other versions cannot be read.
STATE_FORMAT = 4
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of the tensors' names

Index = dict[str, list[FileSlice]]  # all slices of each tensor
Entries = dict[str, Entry]


def inspect_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Return the train state of the checkpoint `step-N` at this path. All ranks call.

    No tensor is read, only the headers of the files.

    Args:
        model: may be on the meta device.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to another model or version.
    """
    return _inspect(path, model)[0]


def load_weights(path: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights, and nothing else, into the model in its dtype. All ranks call.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another model or version.
    """
    require_intact(path)
    _, index = _inspect(path, model)
    with raise_on_all_ranks():
        read_slices(_weights(model), index)


class Checkpointer:
    """Saves and loads `<folder>/step-N/`.

    Args:
        keep_latest_k: older checkpoints are deleted once a newer one is complete; 0 keeps all.
        background: write while training continues (the tensors are copied to host memory first).
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
        self.keep_latest_k, self.background = keep_latest_k, background
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        # The save under way: its step, its train state, and what the result of the thread.
        self._pending: tuple[int, str, futures.Future[Entries]] | None = None
        self._secured: int | None = None
        self._fault: StorageError | None = None

    def save(self, step: int, train_state: dict[str, Any]) -> None:
        """Write the tensors of a checkpoint, or start to in background mode. All ranks call.

        `poll` or `wait` completes the checkpoint. After a storage fault on any rank, they log an
        error and leave nothing of this step.

        Args:
            train_state: JSON values to save beside the tensors.
        """
        self.wait()
        path = self.folder / f"step-{step}"
        state = json.dumps({"format": STATE_FORMAT, "version": __version__, **train_state})
        with self._log_faults(step):
            call_on_rank_0(lambda: fresh_tmp(path))
            slices = slices_to_save(self._tensors())
            if self.background:
                slices = {n: LocalSlice(t.to("cpu", copy=True), b) for n, (t, b) in slices.items()}
            self._pending = step, state, self._thread.submit(_write, tmp_of(path), slices)
            if not self.background:
                futures.wait([self._pending[-1]])

    def poll(self) -> None:
        """Complete the save under way if all ranks have written their part. All ranks call."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[-1].done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done:
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way. All ranks call."""
        if self._pending is not None:
            step, state, future = self._pending
            self._pending = None
            with self._log_faults(step):
                with raise_on_all_ranks():
                    written = future.result()
                self._publish(step, state, written)

    def secured(self) -> int | None:
        """Wait, then return the newest step that was loaded or is complete. All ranks call.

        Return None if the newest save failed, so that the caller tries it again.
        """
        self.wait()
        return self._secured if self._fault is None else None

    def finish(self) -> None:
        """Complete the save under way. All ranks call.

        Raises:
            StorageError: the newest save failed.
        """
        self.wait()
        if self._fault is not None:
            raise self._fault

    def load(self, step: int) -> None:
        """Load weights and optimizer state in place. `inspect_checkpoint` returns the rest.

        The optimizer keeps its own settings (betas, weight decay, ...), which are the recipe's.

        Raises:
            CheckpointError: the checkpoint cannot be read, or belongs to another model or version.
        """
        _, index = _inspect(self.folder / f"step-{step}", self.model)
        with raise_on_all_ranks():
            self._allocate_optimizer_state(index)
            read_slices(self._tensors(), index)
        # The run that published it may have been killed before it could delete older ones.
        prune(self.folder, step, self.keep_latest_k)
        self._secured = step

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved, by its name in the checkpoint."""
        tensors = _weights(self.model)
        for name, parameter in list(tensors.items()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{OPTIMIZER}{name.removeprefix(MODEL)}.{key}"] = value
        return tensors

    def _allocate_optimizer_state(self, index: Index) -> None:
        """Give the optimizer the state that the checkpoint has, without values."""
        self.optimizer.state.clear()  # before the new one takes memory
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        number = {id(parameter): i for i, parameter in enumerate(parameters)}
        weights = _weights(self.model)
        state: dict[int, dict[str, Tensor]] = {}
        for full_name in (n for n in index if n.startswith(OPTIMIZER)):
            name, _, key = full_name.removeprefix(OPTIMIZER).rpartition(".")
            parameter = weights[MODEL + name]
            # AdamW's state: two moments with the parameter's shape, and a scalar step.
            moment = whole_shape(index[full_name]) == tuple(parameter.shape)
            value = torch.empty_like(parameter) if moment else torch.tensor(0.0)
            state.setdefault(number[id(parameter)], {})[key] = value
        # This moves the scalar steps to the device on which the optimizer needs them.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _publish(self, step: int, state: str, written: Entries) -> None:
        """Complete the folder, which all ranks have written to, and rename it. All ranks call."""
        parts: list[Any] | None = None
        if dist.get_rank() == 0:
            parts = [None] * dist.get_world_size()
        dist.gather_object(written, parts)
        path = self.folder / f"step-{step}"

        def complete() -> None:
            write_file(tmp_of(path) / STATE, state)
            publish(path, MANIFEST, {n: entry for part in parts or () for n, entry in part.items()})

        call_on_rank_0(complete)
        logger.info("Checkpoint: wrote %s", path)
        prune(self.folder, step, self.keep_latest_k)
        self._secured, self._fault = step, None

    @contextmanager
    def _log_faults(self, step: int) -> Iterator[None]:
        """Log a StorageError, which all ranks have raised, and delete the incomplete folder."""
        try:
            yield
        except StorageError as error:
            call_on_rank_0(lambda: discard_tmp(self.folder / f"step-{step}"))
            safe = "none is safe yet"
            if self._secured is not None:
                safe = f"step {self._secured} is the newest that is safe"
            self._fault = StorageError(f"checkpoint of step {step} not saved: {error}; {safe}")
            self._fault.__cause__ = error
            logger.error("Storage: %s", self._fault)


def _write(tmp: Path, slices: dict[str, LocalSlice]) -> Entries:
    """Write this rank's slices, in a thread. Return the checksums of its files.

    Raises:
        OSError: a file cannot be written.
    """
    return describe(tmp, write_slices(tmp, slices))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name in a checkpoint; a tied one has only its first name.

    Under FSDP they are sharded: `state_dict` reshards all that a forward gathered.
    """
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {MODEL + n: t for n, t in tensors.items() if first.setdefault(id(t), n) == n}


def _inspect(path: Path, model: nn.Module) -> tuple[dict[str, Any], Index]:
    """Return the train state and the index of a checkpoint. All ranks call; one reads."""

    def read() -> tuple[dict[str, Any], Index]:
        try:
            state = read_json(path / STATE)
            _check_format(path, state)
            return state, read_index(sorted(path.glob("*.safetensors")))
        except (ModelError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); choose another step with "
                f"checkpoint.load_step or another job.dump_folder"
            ) from error

    state, index = call_on_rank_0(read)
    _check_same_model(path, index, model)
    return state, index


def _check_format(path: Path, state: dict[str, Any]) -> None:
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path}: was written by another version of opd_titan ({state.get('version')}, format "
            f"{state.get('format')}; this one reads format {STATE_FORMAT}); use that version, "
            f"choose another job.dump_folder, or start a new run with checkpoint.load_step = 0"
        )


def _check_same_model(path: Path, index: Index, model: nn.Module) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in _weights(model).items()}
    saved = {n: list(whole_shape(parts)) for n, parts in index.items() if n.startswith(MODEL)}
    differ = [n for n in {**wanted, **saved} if saved.get(n) != wanted.get(n)]
    if differ:
        name = differ[0]
        raise CheckpointError(
            f"{path}: is of another model: {name} is {saved.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in student.hf_path ({len(differ)} tensors differ); set "
            f"student.hf_path back or choose another job.dump_folder"
        )
