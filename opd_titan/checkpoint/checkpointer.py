"""Exact-resume checkpoints: weights and optimizer through DCP, the rest as JSON beside them.

A step is written to `step-N.tmp` and renamed when every rank is done, so a folder called `step-N`
is always whole. Nothing of the sampler has to be saved: its random numbers have no state.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from opd_titan.checkpoint.publish import fresh_tmp, publish
from opd_titan.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")
_STATE_FILE = "train_state.json"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(p.name) for p in folder.iterdir())
    found = (int(m.group(1)) for m in matches if m)
    return sorted(n for n in found if (folder / f"step-{n}" / _STATE_FILE).is_file())


def choose_step(folder: Path, load_step: int) -> int | None:
    """The step to resume from: -1 is the newest complete one, 0 is none.

    Raises:
        CheckpointError: a particular step was asked for and is not there.
    """
    steps = complete_steps(folder)
    if load_step == 0 or (load_step == -1 and not steps):
        return None
    if load_step == -1:
        return steps[-1]
    if load_step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"checkpoint.load_step: {folder}/step-{load_step} is not a complete checkpoint; "
            f"complete steps: {have}"
        )
    return load_step


def agree_on_step(folder: Path, load_step: int) -> int | None:
    """`choose_step`, the same on every rank. All ranks call.

    Raises:
        CheckpointError: also where the ranks do not see the same folder.
    """
    # One rank looks: a shared file system may show two ranks two lists.
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            chosen = [choose_step(folder, load_step)]
        except CheckpointError as error:
            chosen = [error]
    dist.broadcast_object_list(chosen)
    if isinstance(chosen[0], CheckpointError):
        raise chosen[0]
    if chosen[0] is not None:
        _require_everywhere(folder / f"step-{chosen[0]}")
    return chosen[0]


def open_folder(folder: Path) -> None:
    """Make the checkpoints' folder. All ranks call.

    Raises:
        CheckpointError: the ranks do not share it; the first save, hours later, would fail.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    _require_everywhere(folder)


def _require_everywhere(path: Path) -> None:
    seen = torch.tensor(int(path.is_dir()))
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    if not seen:
        raise CheckpointError(
            f"job.dump_folder: {path} is not there on every rank; the folder must be on a file "
            f"system that all nodes share"
        )


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
        return json.loads((path / _STATE_FILE).read_text())


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
        self._pending: tuple[Future, int, str] | None = None

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return complete_steps(self.folder)

    def set_aside_after(self, step: int) -> list[int]:
        """Rename the checkpoints of later steps to `step-N.old`. All ranks call.

        For a run that goes back to `step`: what comes after it will be another run's, and must
        neither be resumed from nor push this run's checkpoints out.

        Returns:
            The steps that were set aside.
        """
        later = [n for n in self.steps() if n > step]
        dist.barrier()  # nobody may look any later than this
        if dist.get_rank() == 0:
            for n in later:
                old = self.folder / f"step-{n}.old"
                shutil.rmtree(old, ignore_errors=True)
                (self.folder / f"step-{n}").rename(old)
        return later

    def save(self, step: int, train_state: dict[str, Any]) -> None:
        """Write one checkpoint, or start writing it when in background mode. All ranks call."""
        self.wait()
        tmp = self.folder / f"step-{step}.tmp"
        if dist.get_rank() == 0:
            fresh_tmp(self.folder / f"step-{step}")
        dist.barrier()
        _require_everywhere(tmp)
        state, text = self._state_dict(), json.dumps(train_state)
        if self._group is None:
            dcp.save(state, checkpoint_id=tmp)
            self._finalize(step, text)
        else:
            future = dcp.async_save(_snapshot(state), checkpoint_id=tmp, process_group=self._group)
            self._pending = (future, step, text)

    def poll(self) -> None:
        """Complete a background save if all ranks have written their part. All ranks call."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[0].done()))
        # Not in the save's own group, where its thread may be talking at this moment.
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done:
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way. All ranks call."""
        if self._pending is not None:
            future, step, text = self._pending
            self._pending = None
            future.result()
            self._finalize(step, text)

    def load(self, step: int) -> dict[str, Any]:
        """Load weights and optimizer state in place; the JSON state is returned.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        path = self.folder / f"step-{step}"
        # The recipe's own settings (betas, weight decay, ...) win over the checkpoint's.
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        with _naming_what_is_wrong(path):
            train_state = json.loads((path / _STATE_FILE).read_text())
            state = self._state_dict()
            _check_same_model(path, state)
            dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        return train_state

    def _state_dict(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def _finalize(self, step: int, train_state: str) -> None:
        """All ranks have written: add the JSON, rename, drop what is too old."""
        dist.barrier()
        if dist.get_rank() == 0:
            tmp = self.folder / f"step-{step}.tmp"
            (tmp / _STATE_FILE).write_text(train_state)
            publish(tmp, self.folder / f"step-{step}")
            if self.keep_latest_k > 0:
                for old in self.steps()[: -self.keep_latest_k]:
                    # First what makes it complete: killed half-way, it must not look whole.
                    (self.folder / f"step-{old}" / _STATE_FILE).unlink()
                    shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)
        dist.barrier()


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
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); choose another step with "
            f"checkpoint.load_step or another job.dump_folder"
        ) from error


def _check_same_model(path: Path, state: dict[str, Any]) -> None:
    """DCP itself would not miss a layer that only the checkpoint has."""
    wanted = {f"model.{name}": list(tensor.shape) for name, tensor in state["model"].items()}
    for name, entries in state.get("optimizer", {"state": {}})["state"].items():
        wanted |= {f"optimizer.state.{name}.{key}": list(t.shape) for key, t in entries.items()}
    compared = ("model.", "optimizer.state.") if "optimizer" in state else ("model.",)
    saved = {
        name: list(entry.size)
        for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
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
