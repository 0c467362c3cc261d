"""The properties of a device that select an implementation.

A tensor with data is on its device. A tensor without data (a `FakeTensor`) may stand for a tensor
on another device, for example on a GPU that a run is planned for; its mode names that device.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """The properties of a device that implementations depend on.

    Attributes:
        type: "cpu" or "cuda".
        why_padded: why no kernel for packed or paged tokens runs on it; empty if one may.
        why_plain: why the fused kernels do not run on it; empty if they do.
        packs: whether it has products with packed bf16 weights.
    """

    type: str
    why_padded: str = ""
    why_plain: str = ""
    packs: bool = False


def device_of(x: Tensor | torch.device) -> Device:
    """Return the device of a tensor, or the device that a tensor without data stands for."""
    if isinstance(x, torch.device):
        return _describe(x)
    planned: Device | None = getattr(getattr(x, "fake_mode", None), "stands_for", None)
    return planned or _describe(x.device)


@functools.cache
def _describe(device: torch.device) -> Device:
    if device.type != "cuda":
        why = f"the device is {device.type}"
        return Device(device.type, why, why, packs=device.type == "cpu" and _has_packed_products())
    if torch.cuda.get_device_capability(device) < (8, 0):
        why = "the GPU is older than Ampere"
        return Device("cuda", why, why)
    return Device("cuda", why_plain=_why_no_triton())


def _has_packed_products() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _why_no_triton() -> str:
    """Import the Triton kernels, which implement the operators. Return why they cannot run."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    from opd_titan.models.kernels import attention, head_logits, layers, logits  # noqa: F401

    # Triton compiles each kernel's launcher.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (gcc, clang, or what CC names)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Triton needs Python's header files (Debian's python3-dev)"
    return ""


def why_wrong_type(dtype: torch.dtype) -> str:
    """Return why these kernels do not support the dtype; empty if they do."""
    if dtype not in HALF:
        return f"the type is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    return ""
