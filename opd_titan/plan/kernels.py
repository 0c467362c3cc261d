"""Make a plan, which runs on fake CPU tensors, take the code paths of GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opd_titan.distill import head
from opd_titan.models import kernels
from opd_titan.models.kernels import paged
from opd_titan.rollout import generator, runner, sampler

# Without cuDNN, because torch would ask the (missing) device whether it supports cuDNN.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Figures by kind of device, which the program looks up where it runs.
_FIGURES: tuple[dict[str, int], ...] = (
    head.CHUNK_BYTES,
    sampler.CHUNK_BYTES,
    runner.LAG,
)


@contextmanager
def like_cuda() -> Iterator[None]:
    """Take the branches that the program's code has for GPUs, on fake tensors."""
    patches: list[AbstractContextManager[Any]] = [
        patch.object(FakeTensor, "is_cuda", property(lambda _: True), create=True),
        patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
        # The operators know their shapes where Triton is not installed.
        patch.object(kernels, "why_unavailable", lambda device: ""),
        patch("torch.nn.functional.rms_norm", _rms_norm),
        patch.object(generator, "choose_path", _choose_path),
        sdpa_kernel(_ATTENTION),
        *(patch.dict(figures, cpu=figures["cuda"]) for figures in _FIGURES),
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def _choose_path(head_dim: int, dtype: torch.dtype, device: torch.device) -> Any:
    return paged.choose_path(head_dim, dtype, torch.device("cuda"))


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    """One kernel that keeps its input. On a CPU it is several, which keep more."""
    return _RMSNorm.apply(x, weight)


def know_collectives() -> None:
    """Register collectives for tensors without data, which older versions of torch lack."""
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    if not known("c10d::_allgather_base_", "Meta"):
        from torch.distributed._tools import fake_collectives  # noqa: F401 - registers them


class _RMSNorm(torch.autograd.Function):
    """The shapes of aten::_fused_rms_norm and its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
