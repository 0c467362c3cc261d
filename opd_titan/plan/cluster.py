"""The cluster of a plan, and the assumptions about its speed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from opd_titan.models.kernels.device import Device, device_of

GiB = 2**30


@dataclass(frozen=True)
class Assumed:
    """Constants of the estimated times: measured on one H100 (benchmarks/README.md), or guesses.

    Attributes:
        scoring: share of peak FLOP/s that scoring and prefills reach. Measured: 0.55.
        training: share of peak FLOP/s that the update reaches. Measured: 0.45 with long
            micro-batches.
        layer: seconds that the host takes to launch a layer's forward and backward; the update of
            a small model waits for it. Measured: 0.004.
        memory: share of the memory bandwidth that decoding and the optimizer reach. With `kernel`
            it reproduces measured decoding steps (0.6B to 8B, batch 1 to 256) within 11 %.
        links: share of a link's bandwidth that a collective reaches.
        launch: seconds of the host per kernel of an eager forward; decoding without graphs waits
            for it. Chosen between a bare launch, 5e-6, and the eager baseline in PyTorch's
            "Accelerating Generative AI II", 30e-6 (40 ms for a token of a 7B model with about
            1,300 kernels).
        kernel: seconds that each kernel of a CUDA graph adds to reading and computing, because it
            starts, fills the device and ends.
        latency: seconds per collective and rank of its ring, on top of its bytes.
        host_link: bytes/s between a GPU and its host, for offloaded weights.
        slack: memory that the caching allocator holds beyond live tensors, as a share of them.
    """

    scoring: float = 0.55
    training: float = 0.45
    layer: float = 4e-3
    memory: float = 0.8
    links: float = 0.8
    launch: float = 15e-6
    kernel: float = 2.5e-6
    latency: float = 2e-6
    host_link: float = 25e9
    slack: float = 0.05


@dataclass(frozen=True)
class Cluster:
    """The devices of a plan. Bandwidths are per device and direction, in bytes/s.

    Attributes:
        gpus_per_node: ranks that `node_bandwidth` connects; `network_bandwidth` connects others.
        memory: bytes of one device.
        reserve: bytes outside tensors: CUDA's context, NCCL's buffers, kernels' workspaces. On
            a CPU: Python and its libraries.
        flops: dense bf16 FLOP/s; None if times are not estimated.
        bandwidth: of the device's own memory; None if times are not estimated.
        on_cuda: the devices are GPUs; otherwise the processes of a host.
    """

    world_size: int
    gpus_per_node: int
    memory: float
    reserve: float
    flops: float | None
    bandwidth: float | None
    node_bandwidth: float
    network_bandwidth: float
    on_cuda: bool = True
    assumed: Assumed = field(default_factory=Assumed)

    @property
    def device(self) -> Device:
        """The device that tensors without data stand for: a recent GPU with all kernels, or a CPU.

        A CPU's packed weights take as many bytes as plain ones, but need data.
        """
        if self.on_cuda:
            return Device("cuda")
        return replace(device_of(torch.device("cpu")), packs=False)

    def held(self, alive: float) -> float:
        """Return the bytes of a device that are in use while tensors of `alive` bytes are alive."""
        return alive * (1 + self.assumed.slack * self.on_cuda) + self.reserve

    def link(self, stride: int, ranks: int) -> float:
        """Return the bytes/s per rank of a collective over `ranks` ranks, `stride` apart.

        The ranks of a group that are on one node use their network links together.
        """
        here = max(1, min(ranks, self.gpus_per_node // stride))
        if here == ranks:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.network_bandwidth * here)
