"""Copies between host and device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device. The host does not wait, and may change the tensor at once."""
    if device.type != "cuda":
        return tensor.clone()
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class Fetched:
    """A copy of a tensor on its way to the host, which waits only in `get`."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def get(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
