"""Kernels' launchers as PyTorch operators, so that tensors without data know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("opd_titan", "FRAGMENT")
_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[_Launcher], _Launcher]:
    """Register the decorated launcher as the operator `opd_titan::<schema>` of CUDA tensors.

    `torch.library.custom_op` would do the same at several times the overhead of a call.

    Args:
        fake: returns tensors of the right shapes and types from tensors without data.
    """

    def register(launcher: _Launcher) -> _Launcher:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, launcher, "CUDA")
        torch.library.register_fake(f"opd_titan::{name}", fake, lib=_LIBRARY)
        return launcher

    return register
