"""Copy between host and device without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device. The host does not wait, and may change the tensor at once."""
    if device.type != "cuda":
        return tensor.clone()
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def send_numbers(parts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Return int64 tensors of these numbers on the device, as views of one copied tensor."""
    whole = send(torch.tensor([*chain(*parts)], dtype=torch.int64), device)
    return list(whole.split([len(part) for part in parts]))


class Fetched:
    """An asynchronous copy of a tensor to the host. Only `get` waits for it."""

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
