"""Make the recorder and the profiler of a run, and log compiled graphs."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist

from opd_titan.data.pieces import TokenTexts
from opd_titan.distill.update import UpdateRule
from opd_titan.models.transforms import num_compiled_graphs
from opd_titan.observability.profiling import maybe_profiler
from opd_titan.observability.recorder import Recorder
from opd_titan.training.models import compute_dtype
from opd_titan.training.setup import Setup

logger = logging.getLogger("opd_titan")


def make_recorder(setup: Setup, step: int, rule: UpdateRule) -> Recorder:
    """Return the recorder of a run that continues after `step`."""
    return Recorder(
        setup.job,
        world=setup.world,
        dtype=compute_dtype(setup.job),
        decode=setup.decode,
        grade=setup.grade,
        forward_flops={role: s.args.forward_flops for role, s in setup.sources.items()},
        decode_bytes=setup.sources["student"].args.decode_bytes,
        start_step=step,
        total_steps=setup.total_steps,
        whole=rule.needs_vocabulary,
        texts=TokenTexts(setup.tokenizer),
    )


def make_profiler(setup: Setup, step: int) -> AbstractContextManager[Any]:
    """Return the profiler of a run that continues after `step`."""
    c = setup.job.config.profiling
    return maybe_profiler(c.enable, c.interval, setup.job.folder, dist.get_rank(), start_step=step)


def log_new_graphs(step: int, known: int) -> int:
    """Return the number of compiled graphs, and log it if there are more than `known`.

    Graphs are compiled in the first steps. New ones in later steps explain why these are slow.
    """
    graphs = num_compiled_graphs()
    if graphs > known:
        logger.info(
            "Compiled %s graphs by the end of step %s (%s new)", graphs, step, graphs - known
        )
    return graphs
