"""Running out of memory, said in one line: in which phase, what holds it, and what to change."""

from __future__ import annotations

import torch

from opd_titan.config import JobConfig
from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.errors import Fault, first_line
from opd_titan.observability.metrics import peak_resident_bytes

_GiB = 2**30
# Of what a place is called ("phase rollout of step 3"), what says that a model samples there.
_SAMPLING = ("rollout", "validat", "evaluation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left. The host's has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def out_of_memory(error: BaseException, heartbeat: Heartbeat, config: JobConfig) -> Fault:
    """Return the fault that says so in one line."""
    on_gpu = torch.cuda.is_available()
    held = {name: size for name, size in heartbeat.memory().items() if size}
    total = torch.cuda.memory_allocated() if on_gpu else peak_resident_bytes()
    held["activations and the rest"] = max(0, total - sum(held.values()))
    parts = ", ".join(f"{name} {size / _GiB:.2f}" for name, size in held.items())
    return Fault(
        f"out of memory in {heartbeat.phase}; in use, GiB: {parts}; "
        f"{'; '.join(remedies(heartbeat.phase, config, on_gpu))} ({first_line(error)})"
    )


def remedies(place: str, config: JobConfig, on_gpu: bool) -> list[str]:
    """Options that lower what a place needs, from what costs the least speed."""
    tokens = f"training.max_tokens_per_microbatch (now {config.training.max_tokens_per_microbatch})"
    mode, found = config.activation_checkpoint.mode, []
    if any(word in place for word in _SAMPLING):
        now = config.rollout.max_concurrent or "0, what fits"
        found.append(f"lower rollout.max_concurrent (now {now}) or {tokens}")
    elif "loading" not in place:
        found.append(f"lower {tokens}")
    if "update" in place and mode != "full":
        found.append(f'raise activation_checkpoint.mode (now "{mode}")')
    if on_gpu:
        offloads = {
            "teacher": config.teacher.cpu_offload,
            "optimizer": config.optimizer.cpu_offload,
        }
        left = [f"{name}.cpu_offload" for name, offloads in offloads.items() if not offloads]
        found += [f"set {' or '.join(left)}"] if left else []
    return [*found, "or take more ranks"]
