"""The memory of a device, and how much of it a rollout may keep."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from opd_titan.distributed.collectives import max_scalar

# Share of the memory that is left free: later updates may need a little more than the first.
_SPARE = 0.05


class Holder(Protocol):
    """An object that holds memory for rollouts.

    Attributes:
        num_bytes: bytes, when they are not released.
    """

    @property
    def num_bytes(self) -> int: ...

    def release(self) -> None:
        """Free the memory until the next use."""


class StepMemory:
    """Decide whether the memory of rollouts stays in use while scoring and updates run.

    The needs of scoring and updates are unknown before the first update, so the memory is freed
    for it. From then on, rollouts may keep the memory that the first update left free: the room.

    Attributes:
        room: bytes, the same on all ranks; None before the first update.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.room: int | None = None

    def total_bytes(self) -> int:
        """Return all memory of this rank's device, see `total_bytes`."""
        return total_bytes(self.device)

    def free_bytes(self) -> int:
        """Return the memory that this rank can still take, see `free_bytes`."""
        return free_bytes(self.device)

    def never_used_bytes(self) -> int:
        """Return the memory that no phase has used up to now, see `never_used_bytes`."""
        return never_used_bytes(self.device)

    def measure(self, made: bool = True, most: float = math.inf) -> None:
        """Set the room after the first update that was made. All ranks must call.

        Args:
            made: whether an update was made; the same on all ranks.
            most: upper bound of the room, because later updates may need more than the first.
        """
        if made and self.room is None:
            spare = _SPARE * self.total_bytes()
            free = max(0.0, min(self.never_used_bytes() - spare, most))
            self.room = -int(max_scalar(-free, self.device))

    def room_beside(self, holder: Holder) -> int | None:
        """Return the bytes that may be kept beside this holder; None before the first update."""
        return None if self.room is None else max(0, self.room - holder.num_bytes)

    def make_room(self, *holders: Holder) -> None:
        """Release these holders, unless they fit into the room together. All ranks must call."""
        fits = self.room is not None and sum(h.num_bytes for h in holders) <= self.room
        # All ranks release together, because the next sync of the weights is collective.
        if max_scalar(float(not fits), self.device):
            for holder in holders:
                holder.release()
            if self.room is None and self.device.type == "cuda":
                torch.cuda.empty_cache()  # so that the update's peak shows what it needs


def free_bytes(device: torch.device) -> int:
    """Return the memory that this rank can still take: the GPU's, or its share of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return _host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def never_used_bytes(device: torch.device) -> int:
    """Return the GPU memory that torch's allocator has never taken; on a host, the free memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes(device)


def total_bytes(device: torch.device) -> int:
    """Return all memory of this rank's GPU, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # not in a container, or without a limit
        host = min(host, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host_bytes(root: Path = Path("/")) -> int:
    """Return the free memory of the host; half of its memory if the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").open())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    try:  # the limit of a container, which is not in /proc/meminfo
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Pages of files that were read count as used, but are freed when memory is needed.
        stat = dict(line.split() for line in (group / "memory.stat").open())
    except (OSError, ValueError):
        return available
    return min(available, limit - used + int(stat["inactive_file"]))
