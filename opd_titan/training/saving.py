"""Save checkpoints to resume from, and exports for other programs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_titan.checkpoint.checkpointer import Checkpointer
from opd_titan.checkpoint.hf_export import export_hf, is_exported
from opd_titan.checkpoint.model_card import model_card
from opd_titan.checkpoint.publish import link_latest
from opd_titan.checkpoint.steps import set_aside
from opd_titan.errors import StorageError
from opd_titan.training.models import JobModels
from opd_titan.training.setup import Setup, Start

logger = logging.getLogger("opd_titan")


class Saver:
    """Save, load and export the student of a run. All methods are collective.

    Attributes:
        exported_at: the step of the newest export; 0 for none.
    """

    def __init__(self, setup: Setup, models: JobModels) -> None:
        self.setup, self.models = setup, models
        self.config, self.exports = setup.job.config, setup.job.folder / "hf"
        c = self.config.checkpoint
        self.checkpoints = Checkpointer(
            setup.checkpoints,
            models.student,
            models.optimizer,
            keep_latest_k=c.keep_latest_k,
            background=c.async_mode == "async",
        )
        self.exported_at = 0
        self._export_error: StorageError | None = None

    def load(self, start: Start, suffix: str) -> None:
        """Load the checkpoint that the run starts from, if any, and log the start.

        Args:
            suffix: added to the names of later checkpoints, which this run replaces.
        """
        folder = self.checkpoints.folder
        if start.state is None:
            logger.info("Starting at step 1: %s in %s", start.reason, folder)
        else:
            self.checkpoints.load(start.step)
            self.exported_at = start.state["exported_at"]
            logger.info(
                "Resumed from %s/step-%s (%s): weights of student.hf_path are replaced; next step "
                "%s",
                folder,
                start.step,
                start.reason,
                start.step + 1,
            )
        if self.config.checkpoint.enable:
            set_aside(folder, start.step, suffix)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, or start to; see `Checkpointer.save`.

        Args:
            state: JSON values to save beside the tensors.
        """
        own = {"fingerprint": self.setup.fingerprint, "exported_at": self.exported_at}
        self.checkpoints.save(step, {**own, **state})

    def export(self, step: int, results: dict[str, Any], *, required: bool) -> None:
        """Export the student as a Hugging Face folder. A storage fault is logged.

        Args:
            results: validation results for the model card.
            required: whether `finish` raises the fault. Other exports may be missing, because the
                checkpoint has the weights.
        """
        source, name = self.setup.sources["student"], self.config.export.dtype
        out = self._out(step)
        self._export_error = None
        try:
            export_hf(
                self.models.student,
                out,
                source_folder=source.folder,
                stored=source.files,
                key_table=source.key_table,
                dtype=None if name == "auto" else getattr(torch, name),
                edits=source.edits,
                card=model_card(self.setup.job, step, results),
            )
        except StorageError as error:
            logger.error("Storage: %s", error)
            self._export_error = error if required else None
            return
        if dist.get_rank() == 0:
            link_latest(self.exports, step)
        self.exported_at = step
        logger.info("Export: %s", out)

    def has_exported(self, step: int) -> bool:
        """Return whether this run's export of this step exists."""
        return self.exported_at == step and is_exported(self._out(step))

    def finish(self) -> None:
        """Complete the save under way.

        Raises:
            StorageError: the newest checkpoint or a required export is not complete.
        """
        self.checkpoints.finish()
        if self._export_error is not None:
            raise self._export_error

    def _out(self, step: int) -> Path:
        return self.exports / f"step-{step}"
