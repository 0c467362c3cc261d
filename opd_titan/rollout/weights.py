"""The generator's weights: plain tensors that follow the sharded training weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import axes
from opd_titan.models.kernels import can_pack
from opd_titan.models.layers import Linear, join


class _Copies(Enum):
    """The state of the copies."""

    RELEASED = "they hold no memory"
    STALE = "the training weights may have changed since they were made"
    CURRENT = "they equal the training weights"


class GeneratorWeights:
    """A plain copy of a rank's share of a model, gathered over the data-parallel ranks.

    If a rank already stores its whole share in the right dtype and on the right device, there is
    nothing to copy: the plain model then reads the storage of the training weights.

    Args:
        source: the FSDP-sharded model.
        build: returns the architecture of one rank's share, with the collectives between shares.
        dtype: the compute dtype of the generator; FSDP gathers in the same dtype.
        device: where the generator computes.
        pack: store the layers' weights in a CPU's own layout, if it has one for this dtype.
            Compiled layers do not support it.
        share: read the storage of the training weights if possible; otherwise copy all of them.

    Attributes:
        model: the plain model.
        num_bytes: bytes of the copies when they are not released.
    """

    def __init__(
        self,
        source: nn.Module,
        build: Callable[[], nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        pack: bool = True,
        share: bool = True,
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        with torch.device("meta"):
            self.model = build().requires_grad_(False).eval()
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        copies: dict[str, Tensor] = {}
        tensors = {}
        for name, parameter in source.named_parameters():
            tensor = self._own_storage(parameter) if share else None
            if tensor is None:
                tensor = torch.empty(shapes[name], dtype=dtype, device=device)
                tensor.untyped_storage().resize_(0)  # until `sync`
                copies[name] = tensor
            tensors[name] = tensor
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()  # type: ignore[operator]  # of our own models
        assert not any(p.is_meta for p in self.model.parameters()), "a weight was left out"
        self.num_bytes = sum(t.numel() * t.element_size() for t in copies.values())
        packs = pack and can_pack(dtype, next(self.model.parameters()))
        # The layers with a packed copy, and the other copies, by the weight's name.
        self._packed = self._pop_packed(copies) if packs else {}
        self._plain = copies
        self._storages = self._join_layers()
        self._state = _Copies.RELEASED
        self.release()

    def _pop_packed(self, copies: dict[str, Tensor]) -> dict[str, Linear]:
        """Remove and return the layers to pack: all but the head, which reads a plain weight."""
        layers = {f"{name}.weight": module for name, module in self.model.named_modules()}
        packed = {
            name: layer
            for name, layer in layers.items()
            if isinstance(layer, Linear) and layer is not self.model.lm_head and name in copies
        }
        for name in packed:
            del copies[name]
        return packed

    def _join_layers(self) -> list[Tensor]:
        """Store copies of layers with the same input in one tensor, for one product.

        Returns:
            Tensors that own the memory of all plain copies.
        """
        names = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        single, joined = dict(self._plain), []
        for layers in self.model.layers_with_one_input():  # type: ignore[operator]
            if all(names[layer] in single for layer in layers):
                joined.append(join(layers))
                for layer in layers:
                    self._plain[names[layer]] = layer.weight
                    del single[names[layer]]
        return [*joined, *single.values()]

    def _own_storage(self, parameter: Tensor) -> Tensor | None:
        """Return the storage of this rank's whole share, or None if it has no such storage.

        All ranks have one, or none has.
        """
        if parameter.dtype != self.dtype:
            return None
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        mesh = parameter.device_mesh
        placed = zip(parameter.placements, axes(mesh).items(), strict=True)
        whole = all(p.is_replicate() or ranks == 1 or axis == "tp" for p, (axis, ranks) in placed)
        stored = parameter.to_local().detach()
        return stored if whole and stored.device == self.device else None

    @property
    def bytes_now(self) -> int:
        """Bytes that the copies hold now."""
        return 0 if self._state is _Copies.RELEASED else self.num_bytes

    @torch.no_grad()
    def sync(self) -> None:
        """Make the copies current. All ranks must call. One gathered layer exists at a time."""
        if self._state is _Copies.CURRENT:
            return
        for tensor in self._storages:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
        left: dict[str, Tensor | Linear] = {**self._plain, **self._packed}
        for prefix, module in _innermost_first(self.source):
            mine = [n for n in left if n.startswith(prefix)]
            if not mine:
                continue
            module.unshard()
            gathered = dict(module.named_parameters(prefix=prefix.rstrip(".")))
            for name in mine:
                copy, weight = left.pop(name), local(gathered[name])
                if isinstance(copy, Linear):
                    copy.pack(weight.to(self.dtype))
                else:
                    copy.copy_(weight)
            module.reshard()
        assert not left, f"not gathered: {list(left)}"
        self._state = _Copies.CURRENT

    def mark_stale(self) -> None:
        """Note that the training weights may have changed. All ranks must call."""
        if self._state is _Copies.CURRENT:
            self._state = _Copies.STALE

    def release(self) -> None:
        """Free the copies' memory until the next `sync`. All ranks must call."""
        self._state = _Copies.RELEASED
        for tensor in self._storages:
            tensor.untyped_storage().resize_(0)
        for layer in self._packed.values():
            layer.packed = None


def _innermost_first(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the prefix of the names, and the module, of each group that FSDP gathers together."""
    groups = [(f"{name}." if name else "", m) for name, m in model.named_modules()]
    yield from ((name, m) for name, m in reversed(groups) if isinstance(m, FSDPModule))
