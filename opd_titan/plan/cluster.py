"""The machines of a plan, and what is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Cluster:
    """What the plan is for. Bandwidths are per device and direction, in bytes/s.

    Attributes:
        gpus_per_node: ranks that are joined by `node_bandwidth`; others by `network_bandwidth`.
        memory: bytes of one device that the job may use.
        reserve: bytes that no tensor sees: CUDA's context, NCCL's buffers, kernels' workspaces. On
            a CPU: Python and its libraries.
        flops: dense bf16 FLOP/s.
        bandwidth: of the device's own memory.
        on_cuda: GPUs, or the processes of a host without any.
    """

    world_size: int
    gpus_per_node: int
    memory: float
    reserve: float
    flops: float
    bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    on_cuda: bool = True


@dataclass(frozen=True)
class Assumed:
    """What turns peaks into times. Only GPU runs can tell; correct them when one has.

    Attributes:
        products: share of peak FLOP/s that training and scoring reach while they compute.
        memory: share of the memory bandwidth that decoding reaches.
        links: share of a link's bandwidth that a collective reaches.
        launch: seconds of the host per operation of an eager forward, which decoding waits for.
        latency: seconds of a collective on top of its bytes, per rank of its group's ring.
        slack: share of the peak that the caching allocator holds beyond what is alive.
    """

    products: float = 0.55
    memory: float = 0.7
    links: float = 0.8
    launch: float = 6e-6
    latency: float = 2e-6
    slack: float = 0.05
