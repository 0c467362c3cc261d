"""Report an out-of-memory error in one line: the phase, the memory in use, and remedies."""

from __future__ import annotations

import torch

from opd_titan.config.resolve import ResolvedJob
from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.errors import Fault, first_line
from opd_titan.observability.metrics import peak_resident_bytes

_GiB = 2**30
# Parts of the names of phases in which a model samples.
_SAMPLING = ("rollout", "validat", "evaluation")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def out_of_memory(error: BaseException, heartbeat: Heartbeat, job: ResolvedJob) -> Fault:
    """Return the error to raise."""
    on_gpu = job.device_type == "cuda"
    held = {name: size for name, size in heartbeat.memory().items() if size}
    total = torch.cuda.memory_allocated() if on_gpu else peak_resident_bytes()
    held["activations and the rest"] = max(0, total - sum(held.values()))
    parts = ", ".join(f"{name} {size / _GiB:.2f}" for name, size in held.items())
    return Fault(
        f"out of memory in {heartbeat.phase}; in use, GiB: {parts}; "
        f"{'; '.join(remedies(heartbeat.phase, job))} ({first_line(error)})"
    )


def remedies(phase: str, job: ResolvedJob) -> list[str]:
    """Return the options that lower the memory of a phase, in order of the speed that they cost."""
    config = job.config
    tokens = f"training.max_tokens_per_microbatch (now {config.training.max_tokens_per_microbatch})"
    mode, found = config.activation_checkpoint.mode, []
    if any(word in phase for word in _SAMPLING):
        now = config.rollout.max_concurrent or "0, what fits"
        found.append(f"lower rollout.max_concurrent (now {now}) or {tokens}")
    elif "loading" not in phase:
        found.append(f"lower {tokens}")
    if "update" in phase and mode != "full":
        found.append(f'raise activation_checkpoint.mode (now "{mode}")')
    if job.device_type == "cuda":
        offloads = {
            "teacher": config.teacher.cpu_offload,
            "optimizer": config.optimizer.cpu_offload,
        }
        left = [f"{name}.cpu_offload" for name, offloads in offloads.items() if not offloads]
        found += [f"set {' or '.join(left)}"] if left else []
    return [*found, "or take more ranks"]
