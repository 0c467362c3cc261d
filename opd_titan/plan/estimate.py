"""From one rank's simulated step to memory and seconds per device."""

from __future__ import annotations

from dataclasses import dataclass

from opd_titan.config import JobConfig
from opd_titan.observability.step_scalars import cached_tokens_read, work
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.simulate import Phase, Simulation

# Reads parameter, gradient and two moments; writes all but the gradient.
_OPTIMIZER_BYTES = 28


@dataclass
class Seconds:
    """One phase's time: what it computes (or reads, or waits for), and what it waits to be sent.

    Traffic over the data-parallel axes is hidden behind computing as far as that lasts;
    tensor-parallel traffic is not.
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
        copy_stays: the generator's copy need not be freed for the update.
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


def estimate(config: JobConfig, cluster: Cluster, simulation: Simulation) -> Estimate:
    """Add up a simulation; see `cluster.Assumed` for what is assumed."""
    copy = simulation.resident["generator weights"]
    beside = max(p.peak for n, p in simulation.phases.items() if n not in ("sync", "rollout"))
    copy_stays = copy > 0 and _total(cluster, beside + copy) <= cluster.memory
    peaks = {
        name: phase.peak + (copy if copy_stays and name not in ("sync", "rollout") else 0)
        for name, phase in simulation.phases.items()
    }
    worst = max(peaks, key=lambda name: peaks[name])
    peak = _total(cluster, peaks[worst])
    forward = {role: shape.args.forward_flops for role, shape in simulation.shapes.items()}
    _, flops = work(simulation.samples, forward)
    if "reference" in forward:
        lengths = [s.num_tokens - 1 for s in simulation.samples]
        responses = sum(len(s.response_ids) for s in simulation.samples)
        flops["reference"] = forward["reference"](lengths, responses)
    if config.rollout.on_policy_fraction == 0.0:
        del flops["rollout"]
    seconds: dict[str, Seconds] = {}
    if cluster.flops and cluster.bandwidth:
        seconds = _seconds(config, cluster, simulation, flops)
    return Estimate(peak, worst, copy_stays, peak <= cluster.memory, flops, seconds)


def _total(cluster: Cluster, alive: float) -> float:
    slack = cluster.assumed.slack if cluster.on_cuda else 0.0
    return alive * (1 + slack) + cluster.reserve


def _seconds(
    config: JobConfig, cluster: Cluster, simulation: Simulation, flops: dict[str, float]
) -> dict[str, Seconds]:
    a = cluster.assumed
    rate = cluster.flops * a.products * cluster.world_size
    seconds = {
        name: _traffic(cluster, simulation, phase) for name, phase in simulation.phases.items()
    }
    for name in ("teacher", "reference", "update"):
        if name in seconds:
            seconds[name].busy = flops[name] / rate
    if config.activation_checkpoint.mode == "full":
        lengths = [s.num_tokens - 1 for s in simulation.samples]
        again = simulation.shapes["student"].args.forward_flops(lengths, 0)
        seconds["update"].busy += again / rate
    if "rollout" in seconds:
        seconds["rollout"].busy = _rollout_seconds(cluster, simulation, flops["rollout"] / rate)
    shard = simulation.gradients / 4
    reach = cluster.bandwidth * a.memory
    if config.optimizer.cpu_offload:
        reach = a.host_link
    updates = config.distill.minibatches
    seconds["optimizer"] = Seconds(busy=updates * _OPTIMIZER_BYTES * shard / reach)
    for role, table in (("teacher", config.teacher), ("reference", config.reference)):
        if role in seconds and table.cpu_offload:
            streamed = simulation.weights[role] * simulation.microbatches
            seconds[role].hidden += streamed / a.host_link
    return seconds


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


def _rollout_seconds(cluster: Cluster, simulation: Simulation, computing: float) -> float:
    """Decoding waits for the slowest of arithmetic, memory and the host that launches it."""
    a, args = cluster.assumed, simulation.shapes["student"].args
    tp, dp = simulation.world.tp.size, simulation.world.dp.size
    forwards = simulation.waves * (len(simulation.samples[0].response_ids) - 1)
    # Each of the dp groups reads the weights for itself.
    size = simulation.dtype.itemsize
    read = args.decode_bytes(forwards * dp, cached_tokens_read(simulation.samples), size)
    reading = read / (dp * tp) / (cluster.bandwidth * a.memory)
    launching = forwards * simulation.phases["rollout"].operations * a.launch
    return max(computing, reading, launching)
