"""Find options that make a recipe fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from opd_titan.config import JobConfig
from opd_titan.errors import UserError
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.estimate import Estimate


def remedies(
    config: JobConfig, cluster: Cluster, planned: Callable[[JobConfig], Estimate]
) -> tuple[list[str], Estimate | None]:
    """Return options that make the recipe fit. They are tried one after another, cheapest first.

    Args:
        planned: returns the estimate of a config on the cluster.

    Returns:
        Command-line options, and the estimate with them; None if it does not fit with all of them.
    """
    config = copy.deepcopy(config)
    before = planned(config).peak
    options: list[str] = []
    for table, key, value in _changes(config, cluster):
        changed = copy.deepcopy(config)
        setattr(getattr(changed, table), key, value)
        try:
            found = planned(changed)
        except UserError:  # not every model can be split over that many ranks
            continue
        if found.peak > 0.99 * before:  # it hardly lowers the peak
            continue
        config, before = changed, found.peak
        options = [o for o in options if not o.startswith(f"--{table}.{key} ")]
        options.append(f"--{table}.{key} {str(value).lower()}")
        if found.fits:
            return options, found
    return options, None


def _changes(config: JobConfig, cluster: Cluster) -> Iterator[tuple[str, str, object]]:
    """Yield (table, key, value), ordered by the speed that they cost."""
    if config.validation.enable:  # the teacher is gathered for it
        yield "validation", "enable", False
    if config.activation_checkpoint.mode == "none":
        yield "activation_checkpoint", "mode", "selective"
    if config.activation_checkpoint.mode != "full":
        yield "activation_checkpoint", "mode", "full"
    if config.parallelism.data_parallel_replicate_degree > 1:
        yield "parallelism", "data_parallel_replicate_degree", 1
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = config.training.max_tokens_per_microbatch
    while tokens // 2 >= max(longest, 1024):
        tokens //= 2
        yield "training", "max_tokens_per_microbatch", tokens
    if cluster.on_cuda:
        yield "teacher", "cpu_offload", True
        if config.reference.coef:
            yield "reference", "cpu_offload", True
    degree = config.parallelism.tensor_parallel_degree * 2
    while degree <= min(cluster.gpus_per_node, cluster.world_size):
        yield "parallelism", "tensor_parallel_degree", degree
        degree *= 2
    if cluster.on_cuda:
        yield "optimizer", "cpu_offload", True
