"""Run one job with a heartbeat and signal handlers, and turn failures into one-line errors."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from opd_titan.config import JobConfig
from opd_titan.config.resolve import ResolvedJob, resolve
from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.distributed.launched import launched_rank
from opd_titan.distributed.stopping import Stopped, StopRequest
from opd_titan.distributed.world import world_size
from opd_titan.errors import LostOthers, OneLineError, first_line
from opd_titan.training.out_of_memory import is_out_of_memory, out_of_memory
from opd_titan.training.trainer import Trainer

logger = logging.getLogger("opd_titan")


Work = Callable[[ResolvedJob, StopRequest, Heartbeat], int]


def _train(job: ResolvedJob, stop: StopRequest, heartbeat: Heartbeat) -> int:
    return Trainer(job, stop, heartbeat).train()


def run(config: JobConfig, work: Work = _train) -> int:
    """Train from start to end, or do other work. Return the exit code, see `train.main`.

    Raises:
        UserError: the job cannot be started.
        Fault: the job cannot continue.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    job, comm = resolve(config, device_type, world_size()), config.comm
    patience = max(comm.init_timeout_seconds, comm.train_timeout_seconds)
    heartbeat = Heartbeat(launched_rank(), patience)
    stop = StopRequest()  # before loading, because it may take longer than a scheduler waits
    try:
        return work(job, stop, heartbeat)
    except Stopped:
        where = "before the first step" if work is _train else f"in {heartbeat.phase}"
        logger.warning("Stopped by signal %s %s; start again", stop.signal, where)
        return 75
    except OneLineError:
        raise
    except Exception as error:
        logger.debug("Failed in %s", heartbeat.phase, exc_info=True)
        if is_out_of_memory(error):
            raise out_of_memory(error, heartbeat, job) from error
        if lost_others(error):
            place, why = heartbeat.phase, first_line(error)
            raise LostOthers(f"in {place} another rank did not answer ({why})") from error
        raise
    finally:
        heartbeat.close()


def lost_others(error: Exception) -> bool:
    """Return whether a collective failed because another rank died or missed it."""
    # gloo, unlike NCCL, has no error class of its own; its messages name its source files.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
