"""What a device can do at most, and the share of it that was used.

The work itself is counted by the model family (`forward_flops` and `decode_bytes` of its sizes).
Nothing is added for recomputation, so that the shares stay comparable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Of one device; None where it is not known.

    Attributes:
        flops: dense bf16 FLOP/s with fp32 accumulation.
        bandwidth: bytes/s of its own memory.
    """

    flops: float | None = None
    bandwidth: float | None = None


# Name without "NVIDIA ", dense bf16 FLOP/s, bytes/s; from the vendor's data sheets, whose sparse
# FLOP/s are twice as high. The whole name must match: a MIG slice ("... MIG 1g.10gb") and a share
# of a virtual GPU ("L40S-48Q") have a board's name in theirs, but not its figures.
_DEVICES: list[tuple[str, float, float | None]] = [
    (r"B200", 2.25e15, 8e12),
    (r"H200", 989e12, 4.8e12),
    (r"H200 NVL", 835e12, 4.8e12),
    (r"GH200 (120|480)GB", 989e12, 4.0e12),  # of LPDDR on the CPU; 96 GB of HBM3
    (r"GH200 144G HBM3e", 989e12, 4.9e12),
    (r"H100 80GB HBM3|H800", 989e12, 3.35e12),
    (r"H[18]00 NVL", 835e12, 3.9e12),
    (r"H[18]00 PCIe", 756e12, 2.0e12),
    (r"H20", 148e12, 4.0e12),
    (r"H20-3e", 148e12, None),  # faster memory, of which no data sheet was found
    (r"A[18]00-SXM4-80GB", 312e12, 2.039e12),
    (r"A[18]00 80GB PCIe|A[18]00-PCIE-80GB", 312e12, 1.935e12),
    (r"A[18]00-(SXM4|PCIE)-40GB", 312e12, 1.555e12),
    (r"L40S", 362e12, 864e9),
    (r"L4", 121e12, 300e9),
    (r"GeForce RTX 5090", 209.5e12, 1.792e12),
    (r"GeForce RTX 4090", 165.2e12, 1.008e12),
]


def device_peaks(name: str) -> Peaks:
    """The peaks of a GPU, by the name that `torch.cuda.get_device_name` gives it.

    Unknown for a device that the table lacks: no share is better than one of a made-up peak.
    """
    board = name.removeprefix("NVIDIA ")
    for pattern, flops, bandwidth in _DEVICES:
        if re.fullmatch(pattern, board, re.IGNORECASE):
            return Peaks(flops, bandwidth)
    return Peaks()


def percent_of_peak(work: float, seconds: float, peak: float, world_size: int = 1) -> float:
    """Per cent of the peak that was used: MFU of FLOPs, MBU of bytes.

    Args:
        work: of all ranks together.
        seconds: that they took, by the clock.
        peak: of one device, per second.
        world_size: number of devices, all of them: one of several that hold a model between
            them does its share of the work.
    """
    return 100.0 * work / (seconds * peak * world_size)
