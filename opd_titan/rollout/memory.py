"""How much memory a rollout may count on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this rank can still take: the GPU's, or its share of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return _host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def never_used_bytes(device: torch.device) -> int:
    """Memory of a GPU that not even the allocator's cache holds: beyond the peak of all so far.

    Of a host: what is free now.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes(device)


def total_bytes(device: torch.device) -> int:
    """Memory of this rank's GPU, or its share of the host's, whatever is in use of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no container, or none with a limit
        host = min(host, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host_bytes(root: Path = Path("/")) -> int:
    """What the host can still give; half of its memory where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").open())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    try:  # a container's limit, which /proc/meminfo does not know
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Pages of files that were read count as used, but are given back when asked for.
        stat = dict(line.split() for line in (group / "memory.stat").open())
    except (OSError, ValueError):
        return available
    return min(available, limit - used + int(stat["inactive_file"]))
