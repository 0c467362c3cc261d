"""The peak speed of a device, and the share of it that was used.

The model family counts the work (`forward_flops` and `decode_bytes` of its sizes). Recomputation
does not count, so that the shares stay comparable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Peaks of one device; None if not known.

    Attributes:
        flops: dense bf16 FLOP/s with fp32 accumulation.
        bandwidth: bytes/s of its own memory.
    """

    flops: float | None = None
    bandwidth: float | None = None


# Name without "NVIDIA ", dense bf16 FLOP/s, bytes/s, from the vendor's data sheets. (They also give
# sparse FLOP/s, which are twice as high.) The whole name must match: a MIG slice
# ("... MIG 1g.10gb") and a share of a virtual GPU ("L40S-48Q") contain a board's name, but do not
# reach its figures.
_DEVICES: list[tuple[str, float, float | None]] = [
    (r"B200", 2.25e15, 8e12),
    (r"H200", 989e12, 4.8e12),
    (r"H200 NVL", 835e12, 4.8e12),
    (r"GH200 (120|480)GB", 989e12, 4.0e12),  # GB of LPDDR on the CPU; 96 GB of HBM3
    (r"GH200 144G HBM3e", 989e12, 4.9e12),
    (r"H100 80GB HBM3|H800", 989e12, 3.35e12),
    (r"H[18]00 NVL", 835e12, 3.9e12),
    (r"H[18]00 PCIe", 756e12, 2.0e12),
    (r"H20", 148e12, 4.0e12),
    (r"H20-3e", 148e12, None),  # faster memory; no data sheet was found
    (r"A[18]00-SXM4-80GB", 312e12, 2.039e12),
    (r"A[18]00 80GB PCIe|A[18]00-PCIE-80GB", 312e12, 1.935e12),
    (r"A[18]00-(SXM4|PCIE)-40GB", 312e12, 1.555e12),
    (r"L40S", 362e12, 864e9),
    (r"L4", 121e12, 300e9),
    (r"GeForce RTX 5090", 209.5e12, 1.792e12),
    (r"GeForce RTX 4090", 165.2e12, 1.008e12),
]


def device_peaks(name: str) -> Peaks:
    """Return the peaks of a GPU, given its name from `torch.cuda.get_device_name`.

    A device that is not in the table has none, because a wrong peak is worse than no figure.
    """
    board = name.removeprefix("NVIDIA ")
    for pattern, flops, bandwidth in _DEVICES:
        if re.fullmatch(pattern, board, re.IGNORECASE):
            return Peaks(flops, bandwidth)
    return Peaks()


def percent_of_peak(work: float, seconds: float, peak: float, world_size: int = 1) -> float:
    """Return the percentage of the peak that was used: MFU for FLOPs, MBU for bytes.

    Args:
        work: of all ranks together.
        seconds: wall-clock time of that work.
        peak: of one device, per second.
        world_size: number of devices. Each tensor-parallel rank counts as one.
    """
    return 100.0 * work / (seconds * peak * world_size)
