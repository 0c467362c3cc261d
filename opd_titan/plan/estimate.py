"""Compute memory and seconds per device from the simulated step of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from opd_titan.config.resolve import ResolvedJob, is_teacher
from opd_titan.data.types import Sample
from opd_titan.observability.step_scalars import cached_tokens_read, packed_flops, work
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.simulate import Phase, Simulation

# Reads parameter, gradient and two moments; writes all but the gradient.
_OPTIMIZER_BYTES = 28
# Phases whose peaks hold the generator's copy of the weights already, or its cache.
_HAS_COPY = ("sync", "rollout", "validation")
_HAS_CACHE = ("rollout", "validation")


@dataclass
class Seconds:
    """The time of one phase: computing (or reading, or waiting), and communication.

    Data-parallel traffic overlaps with computing, and costs time only if it takes longer;
    tensor-parallel traffic does not overlap.
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
        copy_stays: the generator's copy and its cache need not be freed for the update.
        flops: of all ranks, by phase.
        seconds: by phase; empty where the device's speed is not known.
    """

    peak: float
    peak_phase: str
    copy_stays: bool
    fits: bool
    flops: dict[str, float]
    seconds: dict[str, Seconds]

    @property
    def step_seconds(self) -> float:
        return sum(s.total for s in self.seconds.values())


def estimate(job: ResolvedJob, cluster: Cluster, simulation: Simulation) -> Estimate:
    """Add up a simulation; see `cluster.Assumed` for what is assumed."""
    copy = simulation.resident["generator weights"]
    peaks = {name: phase.peak for name, phase in simulation.phases.items()}
    # The same rule as in the run: it stays if it fits beside the highest peak of all phases.
    kept = copy + (simulation.kv_cache if simulation.runner else 0)
    copy_stays = kept > 0 and _total(cluster, max(peaks.values()) + kept) <= cluster.memory
    if copy_stays:
        for name in peaks:
            peaks[name] += copy * (name not in _HAS_COPY)
            peaks[name] += simulation.runner * (name not in _HAS_CACHE)
    worst = max(peaks, key=lambda name: peaks[name])
    peak = _total(cluster, peaks[worst])
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
    return Estimate(peak, worst, copy_stays, peak <= cluster.memory, flops, seconds)


def _total(cluster: Cluster, alive: float) -> float:
    slack = cluster.assumed.slack if cluster.on_cuda else 0.0
    return alive * (1 + slack) + cluster.reserve


def _seconds(
    job: ResolvedJob, cluster: Cluster, simulation: Simulation, flops: dict[str, float]
) -> dict[str, Seconds]:
    """Return the seconds of the rank with the most work, because the others wait for it."""
    config, a, phases = job.config, cluster.assumed, simulation.phases
    assert cluster.flops and cluster.bandwidth
    peak = cluster.flops * simulation.world.tp.size
    seconds = {n: _traffic(cluster, simulation, p) for n, p in phases.items() if n != "validation"}
    for name in ("teacher", "reference"):
        if name in seconds:
            seconds[name].busy = _packed_flops(simulation, name) / (peak * a.scoring)
    again = config.activation_checkpoint.mode == "full"
    passes = _packed_flops(simulation, "update") + again * _packed_flops(simulation, "again")
    layers = simulation.shapes["student"].args.n_layers * len(simulation.update_share)
    launching = layers * a.layer if cluster.on_cuda else 0.0
    seconds["update"].busy = max(passes / (peak * a.training), launching)
    if "rollout" in seconds:
        share = len(simulation.rollout_share) / len(simulation.samples)
        seconds["rollout"].busy = _rollout_seconds(
            cluster, simulation, flops["rollout"] * share, peak * a.scoring
        )
    reach = cluster.bandwidth * a.memory
    if config.optimizer.cpu_offload:
        reach = a.host_link
    moved = config.distill.minibatches * _OPTIMIZER_BYTES * simulation.trained
    seconds["optimizer"] = Seconds(busy=moved / reach)
    for role, times in simulation.scored.items():
        if job.models[role].cpu_offload:
            phase = "teacher" if is_teacher(role) else role
            seconds[phase].hidden += simulation.weights[role] * times / a.host_link
    return seconds


def _packed_flops(simulation: Simulation, phase: str) -> float:
    """What this rank computes; a prompt once for each micro-batch that it is in.

    Args:
        phase: or "again", for what full checkpointing makes again.
    """
    role = "student" if phase in ("update", "again") else phase

    def of(samples: list[Sample]) -> float:
        if not samples:
            return 0.0
        model = samples[0].prompt.teacher if role == "teacher" else role
        responses = sum(len(s.response_ids) for s in samples)
        forward = simulation.shapes[model].args.forward_flops
        return packed_flops(samples, forward, 0 if phase == "again" else responses)

    return sum(map(of, simulation.update_share)) * (3.0 if phase == "update" else 1.0)


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


def _rollout_seconds(cluster: Cluster, simulation: Simulation, flops: float, rate: float) -> float:
    """Decoding waits for the slower of arithmetic and memory, and for kernels to start.

    Args:
        flops: of the rank's share, as they count: each prompt is computed once.
        rate: FLOP/s.
    """
    a, args = cluster.assumed, simulation.shapes["student"].args
    assert cluster.bandwidth
    forwards, share = simulation.decode_forwards, simulation.rollout_share
    prompts = {s.prompt.index: len(s.prompt.token_ids) - 1 for s in share}
    starts, ends = ([chunk[i] for chunk in simulation.prefilled] for i in (0, 1))
    # Those of preempted sequences again.
    prefilling = (args.forward_flops(ends, 0) - args.forward_flops(starts, 0)) / rate
    computing = (flops - args.forward_flops(prompts.values(), 0)) / rate
    read = args.decode_bytes(forwards, cached_tokens_read(share), simulation.dtype.itemsize)
    reading = read / simulation.world.tp.size / (cluster.bandwidth * a.memory)
    kernels = forwards * simulation.phases["rollout"].operations
    if simulation.runner:  # graphs
        return prefilling + max(computing, reading) + kernels * a.kernel
    return prefilling + max(computing, reading, kernels * a.launch)
