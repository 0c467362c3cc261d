"""Exact-resume checkpoints: weights and optimizer through DCP, the rest as JSON beside them.

A step is written to `step-N.tmp` and renamed when every rank is done, so a folder called `step-N`
is always whole. Nothing of the sampler has to be saved: its random numbers have no state.
"""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from opd_titan.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")
_STATE_FILE = "train_state.json"


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
        self._pending: tuple[Future, int, dict[str, Any]] | None = None

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(p.name) for p in self.folder.iterdir())
        found = (int(m.group(1)) for m in matches if m)
        return sorted(n for n in found if (self.folder / f"step-{n}" / _STATE_FILE).is_file())

    def choose(self, load_step: int) -> int | None:
        """The step to resume from: -1 is the newest complete one, 0 is none.

        Raises:
            CheckpointError: a particular step was asked for and is not there.
        """
        steps = self.steps()
        if load_step == 0 or (load_step == -1 and not steps):
            return None
        if load_step == -1:
            return steps[-1]
        if load_step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"checkpoint.load_step: {self.folder}/step-{load_step} is not a complete "
                f"checkpoint; complete steps: {have}"
            )
        return load_step

    def save(self, step: int, train_state: dict[str, Any]) -> None:
        """Write one checkpoint, or start writing it when in background mode. All ranks call."""
        self.wait()
        tmp = self.folder / f"step-{step}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        dist.barrier()
        state = self._state_dict()
        if self._group is None:
            dcp.save(state, checkpoint_id=tmp)
            self._finalize(step, train_state)
        else:
            future = dcp.async_save(_snapshot(state), checkpoint_id=tmp, process_group=self._group)
            self._pending = (future, step, train_state)

    def poll(self) -> None:
        """Complete a background save if all ranks have written their part. All ranks call."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[0].done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._group)
        if done:
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way. All ranks call."""
        if self._pending is not None:
            future, step, train_state = self._pending
            self._pending = None
            future.result()
            self._finalize(step, train_state)

    def load(self, step: int) -> dict[str, Any]:
        """Load weights and optimizer state in place; the JSON state is returned.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        path = self.folder / f"step-{step}"
        try:
            train_state = json.loads((path / _STATE_FILE).read_text())
            state = self._state_dict()
            dcp.load(state, checkpoint_id=path)
        # DCP's exception is a BaseException, which `except Exception` would let through.
        except (CheckpointException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{path}: cannot be loaded into this model ({reason}); choose another step with "
                f"checkpoint.load_step or another job.dump_folder"
            ) from error
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return train_state

    def _state_dict(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def _finalize(self, step: int, train_state: dict[str, Any]) -> None:
        """All ranks have written: add the JSON, rename, drop what is too old."""
        dist.barrier()
        if dist.get_rank() == 0:
            tmp, final = self.folder / f"step-{step}.tmp", self.folder / f"step-{step}"
            (tmp / _STATE_FILE).write_text(json.dumps(train_state))
            shutil.rmtree(final, ignore_errors=True)
            tmp.rename(final)
            if self.keep_latest_k > 0:
                for old in self.steps()[: -self.keep_latest_k]:
                    shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)
        dist.barrier()


def _snapshot(state: Any) -> Any:
    """DCP stages CUDA tensors to the host before it returns, but writes CPU tensors from where
    they are, while training is already changing them."""
    if isinstance(state, dict):
        return {k: _snapshot(v) for k, v in state.items()}
    if isinstance(state, torch.Tensor) and state.device.type == "cpu":
        return state.detach().clone()
    return state
