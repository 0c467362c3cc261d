"""How much memory a rollout may count on."""

from __future__ import annotations

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this rank can still take: the GPU's, or its share of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":", 1) for line in f)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
