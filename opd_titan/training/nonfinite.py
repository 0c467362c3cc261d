"""Updates that were not made, for their numbers are not finite: kept for people, and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from opd_titan.config import JobConfig
from opd_titan.data.types import Sample
from opd_titan.distill.update import UpdateResult
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.errors import Fault, reason
from opd_titan.observability.rollout_writer import write_rollouts

logger = logging.getLogger("opd_titan")

_DUMPS = 20  # of one rank; what more of them would show is the same


class SkippedUpdates:
    """Writes down the batch behind each, and gives up when too many come in a row.

    Args:
        grade: as `write_rollouts` has it.

    Attributes:
        in_a_row: up to now; for the checkpoint.
    """

    def __init__(
        self,
        config: JobConfig,
        decode: Callable[[list[int]], str],
        grade: Callable[[str, str], bool | float | None],
    ) -> None:
        self.most, self.decode = config.training.max_skipped_updates, decode
        self.grade = grade
        self.folder = Path(config.job.dump_folder) / "nonfinite"
        self.in_a_row = 0

    def look_at(self, step: int, result: UpdateResult) -> None:
        """Take in a step's updates. All ranks call.

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
        if self.in_a_row > self.most:
            raise Fault(
                f"step {step}: {self.in_a_row} updates in a row had a loss or a gradient that is "
                f"not finite (training.max_skipped_updates = {self.most}); what was written "
                f"of them is in {self.folder}; the last checkpoint is good"
            )

    def _dump(self, step: int, suspects: Sequence[Sample]) -> bool:
        """Whether this rank has written its samples: not without any, and not beyond the limit."""
        if not suspects:
            return False
        folder = self.folder / f"rank-{dist.get_rank()}"
        try:
            # Counted where they lie: a run that is started again and again must end somewhere.
            others = {path.name for path in folder.glob("step-*.jsonl")} - {f"step-{step}.jsonl"}
            if len(others) < _DUMPS:
                write_rollouts(folder, step, suspects, self.decode, self.grade)
            return len(others) < _DUMPS
        except OSError as error:
            logger.error("Storage: %s not written: %s", folder, reason(error))
            return False
