"""Start and end of the process group, the device of this rank, and the data-parallel mesh."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opd_titan.errors import ConfigError


def init_world(init_timeout_seconds: int) -> torch.device:
    """Join the process group that the launcher describes, or start one of a single process.

    Returns:
        The device of this rank: its own GPU, or the CPU where there is none.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(device_type, local_rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside NCCL: checkpoints and Python objects travel over the host.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    single = "RANK" not in os.environ
    dist.init_process_group(
        backend,
        store=dist.HashStore() if single else None,
        rank=0 if single else -1,
        world_size=1 if single else -1,
        timeout=timedelta(seconds=init_timeout_seconds),
    )
    return device


def set_timeout(seconds: int, device: torch.device) -> None:
    """Change the time limit of all groups' collectives: start-up and training need different ones.

    Every rank must call this; none goes on under the new limit before all are here.
    """
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # The mesh may have groups of its own. Assigning `options._timeout` has no effect on gloo.
    # Public since torch 2.15, private before.
    set_group = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
    for group in list(dist.distributed_c10d._world.pg_map):
        set_group(timedelta(seconds=seconds), group)


def build_mesh(device: torch.device, replicate: int, shard: int) -> DeviceMesh:
    """The data-parallel mesh: `[dp_shard]`, or `[dp_replicate, dp_shard]` for hybrid sharding.

    Args:
        replicate: copies of the sharded model.
        shard: ranks that share one copy; -1 takes what the world has left.

    Raises:
        ConfigError: the degrees do not multiply to the world size.
    """
    world = dist.get_world_size()
    asked = shard
    if shard == -1:
        shard = world // replicate
    if replicate * shard != world:
        fits = ", ".join(f"{r} x {world // r}" for r in range(1, world + 1) if world % r == 0)
        raise ConfigError(
            f"[parallelism] data_parallel_replicate_degree {replicate} x "
            f"data_parallel_shard_degree {asked} is not the world size {world}; what fits: {fits}"
        )
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
