"""The process group, the device mesh, and the place of this rank in it.

Throughout the program, a layer is *split* over `tp` and parameters are *sharded* over `dp_shard`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opd_titan.distributed.launched import is_launched


@dataclass(frozen=True)
class Axis:
    """The ranks along one dimension of the mesh, and the position of this rank among them.

    `group` is None only if the axis has a single rank.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


ALONE = Axis()


@dataclass(frozen=True)
class World:
    """The processes of a job, as one rank sees them.

    Attributes:
        device: the device of this rank: its own GPU, or the CPU if there is none.
        mesh: the axes `dp_replicate`, `dp_shard`, `tp`; the first and the last are omitted if they
            have one rank.
        dp: the ranks that divide the data: `dp_replicate` and `dp_shard` together.
        tp: the ranks that split each layer and process the same data.
    """

    device: torch.device
    mesh: DeviceMesh
    dp: Axis
    tp: Axis

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh that FSDP shards over: 1-D, or 2-D with copies of the shards (HSDP)."""
        names = tuple(name for name in axes(self.mesh) if name != "tp")
        return self.mesh[names]

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """The mesh that layers are split over; None if they are not split."""
        return self.mesh["tp"] if self.tp.size > 1 else None


def axes(mesh: DeviceMesh) -> dict[str, int]:
    """Return the number of ranks along each axis of the mesh, by name."""
    assert mesh.mesh_dim_names is not None, "our meshes name their axes"
    return dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))


def world_size() -> int:
    """Return the number of ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def init_world(init_timeout_seconds: int) -> torch.device:
    """Join the process group that the launcher describes, or start one of a single process.

    Returns:
        The device of this rank: its own GPU, or the CPU if there is none.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    single = not is_launched()
    local_rank = 0 if single else int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    # gloo in addition to NCCL, because checkpoints and Python objects are sent from host memory.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.HashStore() if single else None,
        rank=0 if single else -1,
        world_size=1 if single else -1,
        timeout=timedelta(seconds=init_timeout_seconds),
    )
    return device


def set_timeout(seconds: int, device: torch.device) -> None:
    """Change the timeout of collectives in all groups, because start-up and training differ.

    All ranks must call. No rank continues before all have called.
    """
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # The mesh may have groups of its own. Assigning `options._timeout` has no effect on gloo.
    # Public since torch 2.15, private before.
    set_group = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
    for group in list(dist.distributed_c10d._world.pg_map):
        set_group(timedelta(seconds=seconds), group)


def build_world(
    device: torch.device, replicate: int = 1, shard: int | None = None, tensor: int = 1
) -> World:
    """Create the device mesh on the process group. All ranks call.

    `tp` is the innermost dimension, because neighbouring ranks share the fast links of a node; next
    are the shards of a copy, and the copies are outermost.

    Args:
        replicate: number of copies of the sharded model.
        shard: number of ranks that share one copy; None: the world size / (replicate * tensor).
        tensor: number of ranks that each layer is split over.
    """
    if shard is None:
        shard = dist.get_world_size() // (replicate * tensor)
    axes = {"dp_replicate": replicate, "dp_shard": shard, "tp": tensor}
    axes = {name: n for name, n in axes.items() if n > 1 or name == "dp_shard"}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    rank = dist.get_rank()
    return World(
        device=device,
        mesh=mesh,
        dp=Axis(rank // tensor, replicate * shard, _data_group(mesh, replicate, shard, tensor)),
        tp=Axis(rank % tensor, tensor, mesh["tp"].get_group()) if tensor > 1 else ALONE,
    )


def _data_group(
    mesh: DeviceMesh, replicate: int, shard: int, tensor: int
) -> dist.ProcessGroup | None:
    """Return the group of ranks that have the same tensor-parallel rank as this one."""
    if replicate * shard == 1:
        return None
    if tensor == 1:
        return dist.group.WORLD
    if replicate == 1:
        return mesh["dp_shard"].get_group()
    columns = torch.arange(dist.get_world_size()).view(-1, tensor).t().tolist()
    return dist.new_subgroups_by_enumeration(columns)[0]
