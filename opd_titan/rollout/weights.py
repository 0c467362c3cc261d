"""The generator's weights: plain tensors that follow the sharded training weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class GeneratorWeights:
    """A plain copy of a sharded model, refreshed in place parameter by parameter.

    Where one rank holds the whole parameter in the right dtype there is nothing to copy: the plain
    model then reads the training weights' own storage.

    Args:
        source: the FSDP-sharded model.
        build: makes the same, unsharded architecture.
        dtype: what the generator computes in.
    """

    def __init__(
        self, source: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype
    ) -> None:
        self.source, self.dtype = source, dtype
        with torch.device("meta"):
            self.model = build().requires_grad_(False).eval()
        tensors = {}
        for name, parameter in source.named_parameters():
            shared = self._shared(parameter)
            if shared is None:
                device = parameter.device
                shared = torch.empty(parameter.shape, dtype=dtype, device=device)
            tensors[name] = shared
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()
        assert not any(p.is_meta for p in self.model.parameters()), "a weight was left out"
        self.sync()

    def _shared(self, parameter: Tensor) -> Tensor | None:
        """The rank's own storage of the whole parameter, if it has that. The same on all ranks."""
        if parameter.dtype != self.dtype:
            return None
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        placed = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        whole = all(placement.is_replicate() or ranks == 1 for placement, ranks in placed)
        return parameter.to_local().detach() if whole else None

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the source's present values. At most one gathered parameter exists at a time."""
        targets = dict(self.model.named_parameters())
        for name, parameter in self.source.named_parameters():
            target = targets[name]
            shared = self._shared(parameter)
            if shared is not None and shared.data_ptr() == target.data_ptr():
                continue
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            target.copy_(full)
