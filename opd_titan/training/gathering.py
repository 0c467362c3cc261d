"""Choose which weights and gradients stay gathered between the micro-batches of a phase.

FSDP gathers the weights of a layer for every forward and backward, and reduces its gradients after
every backward. If they stay gathered, this is done once per phase instead of once per micro-batch.
It also helps on one rank, where gathering is a copy in another dtype. It costs memory. The choice
is made once, from sizes alone, because all ranks must make the same choice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from opd_titan.config.resolve import ResolvedJob
from opd_titan.distill.head import CHUNK_BYTES
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distributed.collectives import max_scalar
from opd_titan.distributed.sharding import fsdp_groups, keep_gathered
from opd_titan.distributed.world import World, axes
from opd_titan.training.sources import ModelShape

logger = logging.getLogger("opd_titan")

# Share of a device's memory that the choice may plan for. The rest is for fragmentation, the CUDA
# context, buffers of NCCL and of kernels, and whatever the estimate omits.
USABLE = 0.85
_GiB = 2**30


@dataclass(frozen=True)
class Gathering:
    """What stays gathered, the same on all ranks.

    Attributes:
        frozen: roles of the models that stay gathered while they score.
        weights: whether the student's weights stay gathered for all micro-batches of an update.
        gradients: whether its gradients are reduced once per update; until then every rank has
            whole gradients.
        extra: bytes of a device that the gathered tensors take in the update.
        needed: bytes of a device that the update takes, including `extra`.
        usable: bytes of the smallest device that may be used.
    """

    frozen: frozenset[str] = frozenset()
    weights: bool = False
    gradients: bool = False
    extra: float = 0.0
    needed: float = 0.0
    usable: float = 0.0

    def apply(self, models: Mapping[str, nn.Module]) -> None:
        """Configure the models' resharding."""
        for role, model in models.items():
            keep_gathered(model, self.weights if role == "student" else role in self.frozen)

    def __str__(self) -> str:
        kept = ["the student's weights"] * self.weights + ["its gradients"] * self.gradients
        kept += [f"the {role}'s weights" for role in sorted(self.frozen)]
        return (
            f"{', '.join(kept) or 'nothing'} between micro-batches; the update needs about "
            f"{self.needed / _GiB:.1f} of {self.usable / _GiB:.1f} GiB"
        )


def keep_what_fits(
    job: ResolvedJob,
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, ModelShape],
    world: World,
    memory: float,
) -> Gathering:
    """Choose for the smallest device, configure the models and log the choice. All ranks call.

    Args:
        memory: bytes of this rank's device.
    """
    memory = -max_scalar(-memory, world.device)
    found = choose(job, models, shapes, world, memory)
    found.apply(models)
    logger.info("Kept gathered: %s", found)
    return found


def choose(
    job: ResolvedJob,
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, ModelShape],
    world: World,
    memory: float,
) -> Gathering:
    """Choose for devices with `memory` bytes.

    Offloaded models keep nothing gathered: they are offloaded because the memory is short.
    """
    config, dtype = job.config, getattr(torch, job.dtype)
    tp, shards, usable = world.tp.size, axes(world.mesh)["dp_shard"], USABLE * memory
    whole = {r: sum(p.numel() for p in m.parameters()) / tp for r, m in models.items()}
    here = [role for role in models if not shapes[role].spec.cpu_offload]
    # The student in fp32, with its gradients and two moments; the others in the compute dtype.
    stored = {role: 16 if role == "student" else dtype.itemsize for role in here}
    resident = sum(size * whole[role] / shards for role, size in stored.items())
    resident += 4 * CHUNK_BYTES[job.device_type]  # logits, and tensors computed from them
    resident += _whole_distributions(job, shapes, world, dtype)

    tokens = max(config.training.max_tokens_per_microbatch, job.longest)

    def activations(role: str, mode: str) -> float:
        return shapes[role].args.activation_bytes(tokens, mode, dtype.itemsize, tp)

    scored = [role for role in here if role != "student" and fsdp_groups(models[role])]
    scoring = {role: dtype.itemsize * whole[role] + activations(role, "full") for role in scored}
    frozen = frozenset(role for role in scored if resident + scoring[role] <= usable)

    args = shapes["student"].args
    needed = resident + activations("student", config.activation_checkpoint.mode)
    # The head's gradient in fp32, and its casts to the compute dtype.
    needed += (4 + 2 * dtype.itemsize) * args.dim * args.vocab_size / tp
    extra = 0.0
    size = dtype.itemsize * whole["student"]
    weights = "student" in here and needed + size <= usable
    extra += size * weights
    size = 4 * whole["student"] * (1 - 1 / shards)  # without this rank's shard, counted above
    gradients = weights and needed + extra + size <= usable
    extra += size * gradients
    return Gathering(frozen, weights, gradients, extra, needed + extra, usable)


def _whole_distributions(
    job: ResolvedJob, shapes: Mapping[str, ModelShape], world: World, dtype: torch.dtype
) -> float:
    """Return the bytes of frozen models' tensors that an objective over the vocabulary keeps.

    These are the hidden states of all responses, and the heads, each with the embedding that FSDP
    gathers with it.
    """
    config = job.config
    settings = ObjectiveSettings.of(config.distill, config.reference)
    if not OBJECTIVES[config.distill.objective].needs_vocabulary(settings):
        return 0.0
    r, sizes = config.rollout, [s.args for role, s in shapes.items() if role != "student"]
    responses = r.prompts_per_step * r.group_size * r.max_new_tokens / world.dp.size
    each = [a.dim * (responses + 2 * a.vocab_size / world.tp.size) for a in sizes]
    return dtype.itemsize * sum(each)
