"""Dump the batch of a non-finite update; stop after too many in a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from opd_titan.data.types import Sample
from opd_titan.distill.update import UpdateResult
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.errors import Fault, reason
from opd_titan.observability.rollout_writer import write_rollouts

logger = logging.getLogger("opd_titan")

_DUMPS = 20  # of one rank


class NonfiniteUpdates:
    """Dump the batches of updates that were skipped, and stop after too many in a row.

    Args:
        limit: the most updates in a row that may be skipped.
        folder: the dump folder.
        grade: see `write_rollouts`.

    Attributes:
        in_a_row: the number of updates in a row that were skipped up to now.
    """

    def __init__(
        self,
        limit: int,
        folder: Path,
        decode: Callable[[list[int]], str],
        grade: Callable[[str, str], bool | float | None],
    ) -> None:
        self.limit, self.decode, self.grade = limit, decode, grade
        self.folder = folder / "nonfinite"
        self.in_a_row = 0

    def check(self, step: int, result: UpdateResult) -> None:
        """Check the updates of a step. All ranks call.

        Raises:
            Fault: more than training.max_skipped_updates were skipped in a row.
        """
        for made in result.made:
            self.in_a_row = 0 if made else self.in_a_row + 1
        skipped = result.made.count(False)
        if not skipped:
            return
        with raise_on_all_ranks():  # a user's own grader may fail
            mine = self._dump(step, result.suspects)
        written = torch.tensor(int(mine))
        dist.all_reduce(written)
        logger.warning(
            "Step %s: %s of %s updates skipped: the loss or the gradient is not finite; the batch "
            "%s",
            step,
            skipped,
            len(result.made),
            f"is in {self.folder}" if written else "was not written",
        )
        if self.in_a_row > self.limit:
            raise Fault(
                f"step {step}: {self.in_a_row} updates in a row had a loss or a gradient that is "
                f"not finite (training.max_skipped_updates = {self.limit}); their batches are "
                f"in {self.folder}; the last checkpoint is good"
            )

    def _dump(self, step: int, suspects: Sequence[Sample]) -> bool:
        """Write this rank's samples; return whether it has written any."""
        if not suspects:
            return False
        folder = self.folder / f"rank-{dist.get_rank()}"
        try:
            # Counted on the disk, which a run that is restarted again and again must not fill.
            others = {path.name for path in folder.glob("step-*.jsonl")} - {f"step-{step}.jsonl"}
            if len(others) < _DUMPS:
                write_rollouts(folder, step, suspects, self.decode, self.grade)
            return len(others) < _DUMPS
        except OSError as error:
            logger.error("Storage: %s not written: %s", folder, reason(error))
            return False
