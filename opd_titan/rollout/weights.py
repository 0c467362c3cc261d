"""The generator's weights: plain tensors that follow the sharded training weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opd_titan.distributed.collectives import max_scalar
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import axes
from opd_titan.models.layers import Linear, can_pack, join
from opd_titan.rollout.memory import never_used_bytes, total_bytes

if TYPE_CHECKING:
    from opd_titan.rollout.generator import Generator

# Share of the memory that is left alone: later updates may take a little more than the first.
_SPARE = 0.05


class GeneratorWeights:
    """A plain copy of a rank's share of a model, gathered over the data-parallel ranks.

    Where a rank already stores its whole share in the right dtype and place there is nothing to
    copy: the plain model then reads the training weights' own storage.

    Args:
        source: the FSDP-sharded model.
        build: makes the architecture of one rank's share, with the collectives between shares.
        dtype: what the generator computes in; FSDP gathers in the same.
        device: where it computes.
        pack: keep layers' weights in the CPU's own layout where it has one for this type; not for
            compiled layers.
    """

    def __init__(
        self,
        source: nn.Module,
        build: Callable[[], nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        pack: bool = True,
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        with torch.device("meta"):
            self.model = build().requires_grad_(False).eval()
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self._copies: dict[str, Tensor] = {}
        self._packed: dict[str, Linear] = {}
        tensors = {}
        for name, parameter in source.named_parameters():
            shared = self._own_storage(parameter)
            if shared is None:
                shared = torch.empty(shapes[name], dtype=dtype, device=device)
                shared.untyped_storage().resize_(0)  # until `sync`
                self._copies[name] = shared
            tensors[name] = shared
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()  # type: ignore[operator]  # of our own models
        assert not any(p.is_meta for p in self.model.parameters()), "a weight was left out"
        if pack and can_pack(dtype, device):
            self._pack_layers()
        self._owners: list[Tensor] = []  # of the copies' memory
        self._join_layers()
        self._current = False
        self._room: int | None = None
        self.release()

    def _pack_layers(self) -> None:
        """Of these the packed weights are the copies. The head projects with its plain one."""
        for name, module in self.model.named_modules():
            weight = f"{name}.weight"
            if isinstance(module, Linear) and module is not self.model.lm_head:
                if self._copies.pop(weight, None) is not None:
                    module.weight.untyped_storage().resize_(0)
                    self._packed[weight] = module

    def _join_layers(self) -> None:
        """Copies of layers with one input lie together, so that one product serves them."""
        names = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        apart = dict(self._copies)
        for layers in self.model.layers_with_one_input():  # type: ignore[operator]
            if all(names[layer] in apart for layer in layers):
                self._owners.append(join(layers))
                self._owners[-1].untyped_storage().resize_(0)
                for layer in layers:
                    self._copies[names[layer]] = layer.weight
                    del apart[names[layer]]
        self._owners += apart.values()

    @property
    def num_bytes(self) -> int:
        """Of the copies, when they are there."""
        weights = [*self._copies.values(), *(m.weight for m in self._packed.values())]
        return sum(t.numel() * t.element_size() for t in weights)

    @property
    def bytes_now(self) -> int:
        """Of the copies that are there."""
        packed = [m.weight for m in self._packed.values() if m.packed is not None]
        plain = sum(t.untyped_storage().nbytes() for t in self._owners)
        return plain + sum(t.numel() * t.element_size() for t in packed)

    def _own_storage(self, parameter: Tensor) -> Tensor | None:
        """The rank's own storage of its whole share, if it has that. The same on all ranks."""
        if parameter.dtype != self.dtype:
            return None
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        mesh = parameter.device_mesh
        placed = zip(parameter.placements, axes(mesh).items(), strict=True)
        whole = all(p.is_replicate() or ranks == 1 or axis == "tp" for p, (axis, ranks) in placed)
        stored = parameter.to_local().detach()
        return stored if whole and stored.device == self.device else None

    @torch.no_grad()
    def sync(self) -> None:
        """Bring the copies up to date. All ranks call. One gathered layer exists at a time."""
        if self._current:
            return
        self._current = True
        for tensor in self._owners:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
        left: dict[str, Tensor | Linear] = {**self._copies, **self._packed}
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

    def outdate(self, made: bool = True, most: float = math.inf) -> None:
        """Say that the source may have changed. All ranks call.

        Args:
            made: an update was made. The first one that was shows what scoring and updates need:
                what they left can be kept.
            most: bytes that may be kept by what is known of later ones, which may be larger.
        """
        self._current = False
        if made and self._room is None:
            spare = _SPARE * total_bytes(self.device)
            free = max(0.0, min(never_used_bytes(self.device) - spare, most))
            self._room = -int(max_scalar(-free, self.device))

    @property
    def cache_room(self) -> int | None:
        """Bytes that a cache beside the copies may keep for good; None before the first update."""
        return None if self._room is None else max(0, self._room - self.num_bytes)

    def release_if_short(self, generator: Generator | None = None) -> bool:
        """Free the copies and the generator's memory if scoring and update need it.

        They may before the first update, when nobody knows what it takes; and from then on unless
        what they left free then holds all of it. All ranks call.

        Returns:
            Whether memory is short.
        """
        cache_bytes = 0 if generator is None else generator.num_bytes
        short = self._room is None or self.num_bytes + cache_bytes > self._room
        # Together: the next `sync` is collective.
        short = bool(max_scalar(float(short), self.device))
        if short:
            self.release()
            if generator is not None:
                generator.release()
            if self._room is None and self.device.type == "cuda":
                torch.cuda.empty_cache()  # what is in use after the update is what it took
        return short

    def release(self) -> None:
        """Give the copies' memory back until the next `sync`."""
        self._current = False
        for tensor in self._owners:
            tensor.untyped_storage().resize_(0)
        for layer in self._packed.values():
            layer.packed = None


def _innermost_first(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every group of parameters that FSDP gathers together, with its names' prefix."""
    groups = [(f"{name}." if name else "", m) for name, m in model.named_modules()]
    yield from ((name, m) for name, m in reversed(groups) if isinstance(m, FSDPModule))
