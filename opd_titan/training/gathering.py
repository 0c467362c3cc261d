"""What stays gathered between the micro-batches of a phase: decided once, from sizes alone.

FSDP gathers a layer's weights for every forward and every backward, and exchanges its gradients
after every backward. What is kept instead saves that for all micro-batches of a phase but one, also
on a single rank, where gathering is a copy in another type. It costs memory, which a run must not
find out it lacks; and ranks that decided differently would wait for each other for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from opd_titan.config import JobConfig
from opd_titan.distill.head import CHUNK_BYTES
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distributed.collectives import max_scalar
from opd_titan.distributed.sharding import fsdp_groups, keep_gathered
from opd_titan.distributed.world import World, axes
from opd_titan.rollout.memory import total_bytes
from opd_titan.training.models import ModelShape, cpu_offload

logger = logging.getLogger("opd_titan")

# Share of a device's memory that may be planned for: the rest is the allocator's slack, CUDA's
# context, NCCL's and the kernels' buffers, and what the estimate leaves out.
USABLE = 0.85
_GiB = 2**30


@dataclass(frozen=True)
class Gathering:
    """What is kept, the same on all ranks; nothing, by default.

    Attributes:
        frozen: roles of the models that stay gathered while they score.
        weights: of the student, through all micro-batches of an update.
        gradients: of the student: exchanged once per update, and whole on every rank until then.
        extra: bytes that the update keeps on a device for this.
        needed: bytes of a device in the update, those included.
        usable: bytes of the smallest device that may be planned for.
    """

    frozen: frozenset[str] = frozenset()
    weights: bool = False
    gradients: bool = False
    extra: float = 0.0
    needed: float = 0.0
    usable: float = 0.0

    def tell(self, models: Mapping[str, nn.Module]) -> None:
        """Have the models do so."""
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
    config: JobConfig,
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, ModelShape],
    world: World,
    dtype: torch.dtype,
) -> Gathering:
    """Decide, tell the models and the log. All ranks call."""
    memory = -max_scalar(-total_bytes(world.device), world.device)
    found = choose(config, models, shapes, world, dtype, memory)
    found.tell(models)
    logger.info("Kept gathered: %s", found)
    return found


def choose(
    config: JobConfig,
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, ModelShape],
    world: World,
    dtype: torch.dtype,
    memory: float,
) -> Gathering:
    """Decide for devices of so many bytes.

    Models on the host keep nothing: they are there because the device's memory is short.
    """
    tp, shards, usable = world.tp.size, axes(world.mesh)["dp_shard"], USABLE * memory
    whole = {r: sum(p.numel() for p in m.parameters()) / tp for r, m in models.items()}
    here = [role for role in models if not cpu_offload(role, config)]
    # The student in fp32, with its gradients and two moments; the others as they compute.
    stored = {role: 16 if role == "student" else dtype.itemsize for role in here}
    resident = sum(size * whole[role] / shards for role, size in stored.items())
    resident += 4 * CHUNK_BYTES[world.device.type]  # logits, and what is made of them
    resident += _whole_distributions(config, shapes, world, dtype)

    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = max(config.training.max_tokens_per_microbatch, longest)

    def activations(role: str, mode: str) -> float:
        return shapes[role].args.activation_bytes(tokens, mode, dtype.itemsize, tp)

    scored = [role for role in here if role != "student" and fsdp_groups(models[role])]
    scoring = {role: dtype.itemsize * whole[role] + activations(role, "full") for role in scored}
    frozen = frozenset(role for role in scored if resident + scoring[role] <= usable)

    args = shapes["student"].args
    needed = resident + activations("student", config.activation_checkpoint.mode)
    # The head's gradient in fp32, and cast to the type that it goes on in.
    needed += (4 + 2 * dtype.itemsize) * args.dim * args.vocab_size / tp
    extra = 0.0
    size = dtype.itemsize * whole["student"]
    weights = "student" in here and needed + size <= usable
    extra += size * weights
    size = 4 * whole["student"] * (1 - 1 / shards)  # beyond the sums' shards, counted above
    gradients = weights and needed + extra + size <= usable
    extra += size * gradients
    return Gathering(frozen, weights, gradients, extra, needed + extra, usable)


def _whole_distributions(
    config: JobConfig, shapes: Mapping[str, ModelShape], world: World, dtype: torch.dtype
) -> float:
    """Bytes of what an objective over the vocabulary keeps of the frozen models; 0 for others.

    Hidden states of all responses, and the heads, each with the embedding that FSDP gathers too.
    """
    if not OBJECTIVES[config.distill.objective].needs_vocabulary(ObjectiveSettings.of(config)):
        return 0.0
    r, sizes = config.rollout, [s.args for role, s in shapes.items() if role != "student"]
    responses = r.prompts_per_step * r.group_size * r.max_new_tokens / world.dp.size
    each = [a.dim * (responses + 2 * a.vocab_size / world.tp.size) for a in sizes]
    return dtype.itemsize * sum(each)
