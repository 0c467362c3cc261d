"""Exact-resume checkpoints: weights and optimizer through DCP, the rest as JSON beside them.

A step is written to `step-N.tmp` and renamed when every rank is done, so a folder called `step-N`
was whole; a manifest of checksums in it tells whether it still is. Nothing of the sampler has to be
saved: its random numbers have no state.

A fault of storage does not end the run: it is logged, the last good checkpoint stays, and the next
save tries again. Whoever has to know that a step is safe asks `secured` or `require`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from opd_titan.checkpoint.dcp_io import BeatingPlanner, LoadPlanner, Reader, Writer, read_metadata
from opd_titan.checkpoint.faults import naming
from opd_titan.checkpoint.manifest import describe, write_manifest
from opd_titan.checkpoint.publish import publish, tmp_of
from opd_titan.checkpoint.steps import MANIFEST, STATE, make_tmp, prune, require_intact
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.errors import CheckpointError, StorageError, first_line

logger = logging.getLogger("opd_titan")


def inspect_checkpoint(folder: Path, step: int, model: nn.Module) -> dict[str, Any]:
    """The JSON state of a checkpoint, without reading a tensor.

    Args:
        model: may be on the meta device.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    path = folder / f"step-{step}"
    with _naming_what_is_wrong(path):
        _check_same_model(path, {"model": model.state_dict()})
        return json.loads((path / STATE).read_text())


def load_weights(path: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights, and nothing else of it, into the model in its dtype. All call.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    require_intact(path)
    state = {"model": get_model_state_dict(model)}
    with raise_on_all_ranks(), _naming_what_is_wrong(path):
        _check_same_model(path, state)
    with _naming_what_is_wrong(path):
        dcp.load(state, storage_reader=Reader(path), planner=LoadPlanner())
    set_model_state_dict(model, state["model"])


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
        # Its own group: a background save must not mix its collectives with training's.
        self._group = dist.new_group(backend="gloo") if background else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: tuple[int, Future] | None = None
        self._secured: int | None = None
        self._fault: StorageError | None = None

    def save(
        self, step: int, train_state: dict[str, Any], written: Callable[[], None] = lambda: None
    ) -> bool:
        """Write one checkpoint, or start writing it when in background mode. All ranks call.

        Storage that fails, on any rank, is logged as an error and leaves nothing of this step.

        Args:
            written: is called when all is written, and nothing published yet; in background mode
                when the write has begun; not after a failure.

        Returns:
            Whether the checkpoint is written, or being written.
        """
        self.wait()
        text = json.dumps(train_state)
        with self._surviving_faults(step):
            tmp = make_tmp(self.folder / f"step-{step}")
            state, writer = self._state_dict(), Writer(tmp)
            if self._thread is None:
                self._write(writer, state, text)
                written()
                self._publish(step)
            else:
                # As dcp.async_save does: on the host when this returns.
                stager = DefaultStager(StagingOptions(False, False, False, False))
                staged: Any = stager.stage(_snapshot(state))  # a future only if asked for one
                future = self._thread.submit(self._write, writer, staged, text)
                future.add_done_callback(lambda _: stager.close())
                self._pending = (step, future)
                written()
        return self._pending is not None or self._fault is None

    def poll(self) -> None:
        """Complete a background save if all ranks have written their part. All ranks call."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[1].done()))
        # Not in the save's own group, where its thread may be talking at this moment.
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done:
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way. All ranks call."""
        if self._pending is not None:
            step, future = self._pending
            self._pending = None
            with self._surviving_faults(step):
                future.result()
                self._publish(step)

    def secured(self) -> int | None:
        """The newest step that was loaded, or is on the disk. Waits. All ranks call."""
        self.wait()
        return self._secured

    def require(self, step: int) -> None:
        """Make sure that a step is on the disk. All ranks call.

        Raises:
            StorageError: it is not; with what its save met.
        """
        if self.secured() != step:
            raise self._fault or StorageError(f"{self.folder}: step {step} was not saved")

    def load(self, step: int) -> None:
        """Load weights and optimizer state in place; for the rest there is `inspect_checkpoint`.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        path = self.folder / f"step-{step}"
        # The recipe's own settings (betas, weight decay, ...) win over the checkpoint's.
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        state = self._state_dict()
        with raise_on_all_ranks(), _naming_what_is_wrong(path):
            _check_same_model(path, state)
        with _naming_what_is_wrong(path):
            dcp.load(state, storage_reader=Reader(path), planner=LoadPlanner())
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self._prune(step)  # the run that published it may have been killed before it could
        self._secured = step

    def _state_dict(self) -> dict[str, Any]:
        untouched = not self.optimizer.state
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        if untouched:  # DCP has made its state with an update of nothing, which counts as one
            for state in self.optimizer.state.values():
                state["step"].zero_()
        return {"model": model_state, "optimizer": optimizer_state}

    def _write(self, writer: Writer, state: dict[str, Any], train_state: str) -> None:
        """All of a step's files, on the disk when this returns. May be in a thread of its own.

        Raises:
            StorageError: on all ranks, when one of them could not write.
        """
        folder, rank, group = Path(writer.path), dist.get_rank(), self._group
        planner = BeatingPlanner()
        dcp.save(state, storage_writer=writer, planner=planner, process_group=group)
        mine: dict[str, Any] = {}
        with raise_on_all_ranks(group):
            writer.raise_fault()
            if rank == 0:
                with naming(folder / STATE):
                    (folder / STATE).write_text(train_state)
            mine = describe(folder, _own_files(folder, rank))
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine, group)
        with raise_on_all_ranks(group):
            if rank == 0:
                write_manifest(folder / MANIFEST, {k: v for part in parts for k, v in part.items()})

    def _publish(self, step: int) -> None:
        """All ranks have written: rename, drop what is too old."""
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                publish(self.folder / f"step-{step}")
        self._prune(step)
        self._secured, self._fault = step, None

    def _prune(self, newest: int) -> None:
        with raise_on_all_ranks():
            if dist.get_rank() == 0 and self.keep_latest_k > 0:
                prune(self.folder, newest, self.keep_latest_k)

    @contextmanager
    def _surviving_faults(self, step: int) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            with raise_on_all_ranks():  # for every rank it is gone after this
                if dist.get_rank() == 0:
                    shutil.rmtree(tmp_of(self.folder / f"step-{step}"), ignore_errors=True)
            safe = "none is safe yet"
            if self._secured is not None:
                safe = f"step {self._secured} is the newest that is safe"
            self._fault = StorageError(f"checkpoint of step {step} not saved: {error}; {safe}")
            self._fault.__cause__ = error
            logger.error("Storage: %s", self._fault)


def _own_files(folder: Path, rank: int) -> list[str]:
    """What this rank has written itself, so that it is still in this node's memory."""
    names = [path.name for path in folder.iterdir()]
    shared = [name for name in names if not name.startswith("__")] if rank == 0 else []
    return [*shared, *(name for name in names if name.startswith(f"__{rank}_"))]


@contextmanager
def _naming_what_is_wrong(path: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint raises into one line."""
    try:
        yield
    # DCP's exception is a BaseException, which `except Exception` would let through.
    except (CheckpointException, OSError, ValueError, EOFError, UnpicklingError) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(
            f"{path}: cannot be read ({type(cause).__name__}: {first_line(cause)}); choose another "
            f"step with checkpoint.load_step or another job.dump_folder"
        ) from error


def _check_same_model(path: Path, state: dict[str, Any]) -> None:
    """DCP itself would not miss a layer that only the checkpoint has."""
    wanted = {f"model.{name}": list(tensor.shape) for name, tensor in state["model"].items()}
    for name, entries in state.get("optimizer", {"state": {}})["state"].items():
        wanted |= {f"optimizer.state.{name}.{key}": list(t.shape) for key, t in entries.items()}
    compared = ("model.", "optimizer.state.") if "optimizer" in state else ("model.",)
    saved = {
        name: list(entry.size) if isinstance(entry, TensorStorageMetadata) else []
        for name, entry in read_metadata(path).state_dict_metadata.items()
        if name.startswith(compared)
    }
    differ = [n for n in {**wanted, **saved} if saved.get(n) != wanted.get(n)]
    if differ:
        name = differ[0]
        raise CheckpointError(
            f"{path}: is of another model: {name} is {saved.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in student.hf_path ({len(differ)} tensors differ); set "
            f"student.hf_path back or choose another job.dump_folder"
        )


def _snapshot(state: Any) -> Any:
    """DCP stages CUDA tensors to the host before it returns, but writes CPU tensors from where
    they are, while training is already changing them."""
    if isinstance(state, dict):
        return {k: _snapshot(v) for k, v in state.items()}
    if isinstance(state, torch.Tensor) and state.device.type == "cpu":
        return state.detach().clone()
    return state
