"""Load the models of a job, sharded over all ranks, and build the generator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from opd_titan.checkpoint.hf_load import load_hf_weights, random_init_weights
from opd_titan.config.resolve import ResolvedJob
from opd_titan.distill.optim import build_optimizer
from opd_titan.distributed.heartbeat import set_phase, track_memory
from opd_titan.distributed.sharding import device_bytes
from opd_titan.distributed.stopping import StopRequest
from opd_titan.distributed.world import World
from opd_titan.models.attention import why_padded
from opd_titan.models.kernels.device import device_of
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.memory import StepMemory
from opd_titan.rollout.runner import Runner
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.gathering import Gathering, keep_what_fits
from opd_titan.training.sources import ModelShape, ModelSource

logger = logging.getLogger("opd_titan")


@dataclass(frozen=True)
class JobModels:
    """The models, the optimizer and the generator of a job.

    Attributes:
        shapes: the architectures by role.
        frozen: teachers and reference, by role.
        weights: the generator's copy of the student's weights.
        memory: decides whether that copy and the KV cache stay in use between rollouts.
        kept: what stays gathered between micro-batches.
    """

    shapes: Mapping[str, ModelShape]
    student: nn.Module
    frozen: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    weights: GeneratorWeights
    generator: Generator
    memory: StepMemory
    kept: Gathering


def load_models(
    job: ResolvedJob, sources: dict[str, ModelSource], world: World, stop: StopRequest
) -> JobModels:
    """Load every model of the job. All ranks call.

    Raises:
        Stopped: after a signal.
    """
    models: dict[str, nn.Module] = {}
    for role, source in sources.items():
        set_phase(f"the loading of the {role}")
        stop.check()
        models[role] = load_model(job, source, world)
    return join_models(
        job, sources, models, sources["student"].eos_ids, world, StepMemory(world.device)
    )


def join_models(
    job: ResolvedJob,
    shapes: Mapping[str, ModelShape],
    models: Mapping[str, nn.Module],
    eos_ids: set[int],
    world: World,
    memory: StepMemory,
    runner: Callable[..., Runner] = Runner,
) -> JobModels:
    """Decide what stays gathered, and build the optimizer and the generator. All ranks call.

    Args:
        models: by role, with storage for their parameters.
        runner: see `Generator`.
    """
    kept = keep_what_fits(job, models, shapes, world, memory.total_bytes())
    frozen = dict(models)
    student = frozen.pop("student")
    optimizer = build_optimizer(student, job.config.optimizer)
    weights, generator = build_generator(
        job, shapes["student"], student, eos_ids, world, memory, runner
    )
    return JobModels(shapes, student, frozen, optimizer, weights, generator, memory, kept)


def load_model(job: ResolvedJob, source: ModelSource, world: World) -> nn.Module:
    """Build a model on the meta device, shard it, and read each rank's slices of the weights.

    The student is stored in fp32, as the optimizer's master weights; frozen models are stored in
    the compute dtype.
    """
    start = time.perf_counter()
    why = why_padded(compute_dtype(job), world.device)
    if why and world.device.type == "cuda" and source.spec.is_trained:
        logger.warning("Training and scoring pad sequences for attention, which is slow: %s", why)
    model = allocated_model(job, source, world)
    if source.files is None:
        random_init_weights(model, source.spec.seed, source.args.init_std)
    else:
        load_hf_weights(model, source.files, source.key_table)
    model.assert_tied()  # type: ignore[operator]  # of our own models
    stored = device_bytes(model.parameters())
    track_memory(f"{source.role} weights", model, lambda _: stored)
    logger.info(
        "%s: %s, %s parameters, %s, in %.1f s",
        source.role.capitalize(),
        source.folder,
        f"{sum(p.numel() for p in model.parameters()):,}",
        "RANDOM weights" if source.files is None else "weights loaded",
        time.perf_counter() - start,
    )
    return model


def allocated_model(job: ResolvedJob, source: ModelShape, world: World) -> nn.Module:
    """Return the sharded model with storage for its parameters, but without values."""
    mode = job.config.activation_checkpoint.mode
    model = parallel_model(source, world, compute_dtype(job), mode, job.compiled)
    allocate(model, torch.device("cpu") if source.spec.cpu_offload else world.device)
    return model


def parallel_model(
    source: ModelShape,
    world: World,
    dtype: torch.dtype,
    activation_checkpoint: str,
    compiled: bool,
) -> nn.Module:
    """Return the model, sharded over the world, on the meta device.

    Args:
        dtype: the compute dtype.
        activation_checkpoint: mode of the student; other models keep no activations.
    """
    trained = source.spec.is_trained
    with torch.device("meta"):
        model = source.build().to(torch.float32 if trained else dtype)
    if not trained:
        model.requires_grad_(False).eval()
    source.family.parallelize(
        model,
        world,
        dtype,
        activation_checkpoint=activation_checkpoint if trained else "none",
        compile=compiled,
        cpu_offload=source.spec.cpu_offload,
    )
    return model


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give the parameters storage without values, and tie again what `to_empty` unties."""
    model.to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]  # of our own models


def build_generator(
    job: ResolvedJob,
    source: ModelShape,
    model: nn.Module,
    eos_ids: set[int],
    world: World,
    memory: StepMemory,
    runner: Callable[..., Runner] = Runner,
) -> tuple[GeneratorWeights, Generator]:
    """Return the weights and the generator of a loaded model. Sync the weights before use.

    Args:
        eos_ids: each of these tokens ends a response.
        memory: reports the free memory, and how much may stay in use between rollouts.
        runner: see `Generator`.
    """
    # Fused kernels, if the device has them, replace the compiler.
    compiled = job.compiled and bool(device_of(world.device).why_plain)
    build = partial(source.build_share, world.tp, compiled)
    # A model on the host has no storage that a GPU's generator can read.
    share = job.device_type == "cpu" or not source.spec.cpu_offload
    weights = GeneratorWeights(
        model, build, compute_dtype(job), world.device, pack=not compiled, share=share
    )
    generator = Generator(
        weights.model,
        eos_ids,
        job.config.rollout.max_concurrent,
        job.config.training.max_tokens_per_microbatch,
        world.tp,
        room=lambda: memory.room_beside(weights),
        free=memory.free_bytes,
        runner=runner,
    )
    track_memory(f"rollout's copy of the {source.role}", weights, lambda w: w.bytes_now)
    track_memory(f"KV cache of the {source.role}", generator, lambda g: g.num_bytes)
    log = logger.warning if generator.path.why else logger.info
    log("Rollouts of the %s: %s", source.role, generator.path)
    return weights, generator


def compute_dtype(job: ResolvedJob) -> torch.dtype:
    """Return the dtype that the job's models compute in."""
    return getattr(torch, job.dtype)
