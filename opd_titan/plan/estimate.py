"""Compute memory and seconds per device from the simulated step of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from opd_titan.config.resolve import ResolvedJob, is_teacher
from opd_titan.data.types import Sample
from opd_titan.observability.step_scalars import cached_tokens_read, packed_flops, work
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.simulate import Simulation
from opd_titan.plan.tracker import Phase
from opd_titan.training.models import compute_dtype

# For each byte of the fp32 weights: the optimizer reads parameter, gradient and two moments, and
# writes all but the gradient.
_OPTIMIZER_PASSES = 7


@dataclass
class Seconds:
    """The time of one phase.

    Attributes:
        busy: computing, reading memory, or waiting for the host.
        hidden: data-parallel traffic, which overlaps with computing.
        exposed: tensor-parallel traffic, which does not overlap.
    """

    busy: float = 0.0
    hidden: float = 0.0
    exposed: float = 0.0

    @property
    def total(self) -> float:
        return max(self.busy, self.hidden) + self.exposed


@dataclass
class Estimate:
    """Bytes and seconds of one device in one step.

    Attributes:
        flops: of all ranks, by phase.
        seconds: by phase; empty if the device's speed is not known.
    """

    peak: float
    peak_phase: str
    fits: bool
    flops: dict[str, float]
    seconds: dict[str, Seconds]

    @property
    def step_seconds(self) -> float:
        return sum(s.total for s in self.seconds.values())


def estimate(job: ResolvedJob, cluster: Cluster, simulation: Simulation) -> Estimate:
    """Return the estimate of a simulation; see `cluster.Assumed` for the assumptions."""
    peaks = {name: phase.peak for name, phase in simulation.phases.items()}
    if simulation.stays:
        copy, cache = simulation.resident["generator weights"], simulation.rollout.kept
        for name in peaks.keys() - {"rollout", "validation"}:
            peaks[name] += cache + copy * (name != "sync")  # the sync counts the copy itself
    worst = max(peaks, key=lambda name: peaks[name])
    peak = cluster.held(peaks[worst])
    forward = {role: shape.args.forward_flops for role, shape in simulation.shapes.items()}
    _, flops = work(simulation.samples, forward)
    if "reference" in forward:
        responses = sum(len(s.response_ids) for s in simulation.samples)
        flops["reference"] = packed_flops(simulation.samples, forward["reference"], responses)
    if not job.on_policy:
        del flops["rollout"]
    seconds: dict[str, Seconds] = {}
    if cluster.flops and cluster.bandwidth:
        seconds = _seconds(job, cluster, simulation, flops)
    return Estimate(peak, worst, peak <= cluster.memory, flops, seconds)


def _seconds(
    job: ResolvedJob, cluster: Cluster, simulation: Simulation, flops: dict[str, float]
) -> dict[str, Seconds]:
    """Return the seconds of the rank with the most work, because the others wait for it."""
    config, a, phases = job.config, cluster.assumed, simulation.phases
    assert cluster.flops and cluster.bandwidth
    peak = cluster.flops * simulation.world.tp.size
    seconds = {n: _traffic(cluster, simulation, p) for n, p in phases.items() if n != "validation"}
    for role, spec in job.models.items():
        if role == "student" or not simulation.microbatches(role):
            continue
        scoring = seconds["teacher" if is_teacher(role) else role]
        scoring.busy += _packed_flops(simulation, role) / (peak * a.scoring)
        if spec.cpu_offload:
            moved = simulation.weights[role] * len(simulation.microbatches(role))
            scoring.hidden += moved / a.host_link
    recomputed = 0.0
    if config.activation_checkpoint.mode == "full":
        recomputed = _packed_flops(simulation, "student", with_head=False)
    passes = 3.0 * _packed_flops(simulation, "student") + recomputed
    layers = simulation.shapes["student"].args.n_layers * len(simulation.microbatches())
    launching = layers * a.layer if cluster.on_cuda else 0.0
    seconds["update"].busy = max(passes / (peak * a.training), launching)
    if "rollout" in seconds:
        share = len(simulation.rollout_share) / len(simulation.samples)
        seconds["rollout"].busy = _rollout_seconds(
            job, cluster, simulation, flops["rollout"] * share, peak * a.scoring
        )
    reach = cluster.bandwidth * a.memory
    if config.optimizer.cpu_offload:
        reach = a.host_link
    moved = config.distill.minibatches * _OPTIMIZER_PASSES * simulation.weights["student"]
    seconds["optimizer"] = Seconds(busy=moved / reach)
    return seconds


def _packed_flops(simulation: Simulation, role: str, with_head: bool = True) -> float:
    """Return the FLOPs of this rank's forwards; a prompt counts once for each micro-batch."""
    forward = simulation.shapes[role].args.forward_flops

    def flops(samples: list[Sample]) -> float:
        responses = sum(len(s.response_ids) for s in samples)
        return packed_flops(samples, forward, responses if with_head else 0)

    return sum(map(flops, simulation.microbatches(role)))


def _traffic(cluster: Cluster, simulation: Simulation, phase: Phase) -> Seconds:
    a, result = cluster.assumed, Seconds()
    stride = 1
    for axis in ("tp", "dp_shard", "dp_replicate"):
        ranks = simulation.axes.get(axis, 1)
        bandwidth = cluster.link(stride, ranks) * a.links
        time = phase.sent.get(axis, 0.0) / bandwidth
        time += phase.collectives.get(axis, 0.0) * a.latency * (ranks - 1)
        if axis == "tp":
            result.exposed += time
        else:
            result.hidden += time
        stride *= ranks
    return result


def _rollout_seconds(
    job: ResolvedJob, cluster: Cluster, simulation: Simulation, flops: float, rate: float
) -> float:
    """Return the seconds of prefills, and of decoding.

    Decoding waits for the slower of arithmetic and memory, and for kernels to start.

    Args:
        flops: of the rank's share; each prompt is computed once.
        rate: FLOP/s.
    """
    a, args = cluster.assumed, simulation.shapes["student"].args
    assert cluster.bandwidth
    rollout, share = simulation.rollout, simulation.rollout_share
    forwards = rollout.decode_forwards
    prompts = {s.prompt.index: len(s.prompt.token_ids) - 1 for s in share}
    starts, ends = ([chunk[i] for chunk in rollout.prefilled] for i in (0, 1))
    # Preempted sequences are computed again.
    prefilling = (args.forward_flops(ends, 0) - args.forward_flops(starts, 0)) / rate
    computing = (flops - args.forward_flops(prompts.values(), 0)) / rate
    itemsize = compute_dtype(job).itemsize
    read = args.decode_bytes(forwards, cached_tokens_read(share), itemsize)
    reading = read / simulation.world.tp.size / (cluster.bandwidth * a.memory)
    kernels = forwards * simulation.phases["rollout"].operations
    if rollout.kept:  # graphs
        return prefilling + max(computing, reading) + kernels * a.kernel
    return prefilling + max(computing, reading, kernels * a.launch)
