"""What a device can do, and the share of it that was used.

The work itself is counted by the model family (`forward_flops` of its sizes). Nothing is added for
recomputation, so that MFU stays comparable.
"""

from __future__ import annotations

import re

# Dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets (the sparse figures
# halved). First match wins; a name that matches nothing has no MFU.
_PEAK_FLOPS: list[tuple[str, float]] = [
    (r"\bMIG\b", 0.0),  # a slice of a GPU: its share is not in the name
    (r"\bB200\b", 2.25e15),
    (r"\bH200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH[18]00 PCIe\b", 756e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 5090$", 209.5e12),
    (r"\bRTX 4090$", 165.2e12),
]


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, by the name that `torch.cuda.get_device_name` gives it.

    None for a device that the table does not know, and for a slice of one: no MFU is better
    than one against a made-up peak.
    """
    for pattern, peak in _PEAK_FLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak or None
    return None


def mfu(flops: float, seconds: float, peak: float, world_size: int = 1) -> float:
    """Per cent of the peak that was used.

    Args:
        flops: of all ranks together.
        seconds: that they took, by the clock.
        peak: FLOP/s of one device.
    """
    return 100.0 * flops / (seconds * peak * world_size)
