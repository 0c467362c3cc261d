"""The console output of a job: its plan at the start, a line per step, its outcome."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from opd_titan.config.resolve import ResolvedJob
from opd_titan.observability.logging import paint

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("opd_titan")

_CLOCK = len("[00:00:00] ")

# Figures of the step line, the most important first. A narrow terminal shows as many as fit.
_FIGURES = {
    "kl/student_teacher": ("kl {:.4f}", "green"),
    "validation/gap_recovered": ("gap recovered {:.1%}", "green"),
    "rollout/response_tokens_mean": ("len {:.1f}", "blue"),
    "rollout/truncated_fraction": ("cut {:.1%}", "blue"),
    "eta": ("eta {}", "cyan"),
    "throughput/rollout(tok/s/gpu)": ("rollout {:,.0f} tok/s", "cyan"),
    "throughput/update(tok/s/gpu)": ("update {:,.0f} tok/s", "cyan"),
    "memory/max_reserved(GiB)": ("mem {:.2f} GiB", "cyan"),
    "throughput/teacher(tok/s/gpu)": ("teacher {:,.0f} tok/s", "cyan"),
    "loss/policy": ("loss {:.4f}", "yellow"),
    "grad_norm": ("grad {:.3f}", "magenta"),
    "time/step(s)": ("{:.2f} s/step", "cyan"),
    "lr": ("lr {:.2e}", "yellow"),
}


def console_line(
    step: int,
    total_steps: int,
    scalars: Mapping[str, float],
    *,
    eta_seconds: float | None = None,
    columns: int | None = None,
) -> str:
    """Return the line of a step, in color. It names every scalar that is not finite.

    Args:
        columns: width of the terminal; figures that do not fit are omitted. None shows all.
    """
    values: dict[str, Any] = {n: v for n, v in scalars.items() if math.isfinite(v)}
    if eta_seconds is not None:
        values["eta"] = duration(eta_seconds)
    parts = [(f"step {step:>{len(str(total_steps))}}/{total_steps}", "red")]
    if bad := [name for name in scalars if name not in values]:
        parts.append((f"not finite: {', '.join(bad)}", "red"))
    width = _CLOCK + sum(len(text) + 2 for text, _ in parts) - 2
    for name, (form, color) in _FIGURES.items():
        if name in values:
            text = form.format(values[name])
            width += 2 + len(text)
            if columns is not None and width > columns:
                break
            parts.append((text, color))
    return "  ".join(paint(text, color) for text, color in parts)


def terminal_columns() -> int | None:
    """Return the width of the terminal, or None if stdout is not one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def duration(seconds: float) -> str:
    """Return h:mm:ss, after the number of days if there are any."""
    return str(timedelta(seconds=round(seconds)))


# ------------------------------------------------------------------------ start


def report_job(
    job: ResolvedJob,
    total_steps: int,
    student: nn.Module,
    frozen: Mapping[str, nn.Module],
) -> None:
    """Log what the job will do, the memory of its models on this rank, and the output folders.

    Args:
        frozen: the other models by role.
    """
    config, name = job.config, job.dtype
    r, folder = config.rollout, job.folder
    masters = "" if name == "float32" else ", the student's master weights in float32"
    logger.info(
        f"Job: {config.distill.objective}, {total_steps:,} steps of {r.prompts_per_step} prompts x "
        f"{r.group_size} responses of up to {r.max_new_tokens:,} tokens, in {name}{masters}"
    )
    logger.info("Memory: %s, before activations and rollouts", _memory(student, frozen))
    written = {
        "tb/": config.metrics.enable_tensorboard,
        "rollouts/": config.metrics.sample_rollouts != 0,
        "checkpoint/": config.checkpoint.enable,
        "hf/": True,
        "logs/": True,
    }
    logger.info("Files: %s: %s", folder, ", ".join(name for name, on in written.items() if on))


def _memory(student: nn.Module, frozen: Mapping[str, nn.Module]) -> str:
    trained = _local_bytes(student)
    sizes = {"student": trained, "gradients": trained, "Adam": 2 * trained}
    sizes |= {role: _local_bytes(model) for role, model in frozen.items()}
    parts = ", ".join(f"{name} {_size(count)}" for name, count in sizes.items())
    return f"{_size(sum(sizes.values()))} per rank ({parts})"


def _local_bytes(model: nn.Module) -> int:
    """Return the bytes of this rank's shard of the parameters."""
    local: list[Any] = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in local)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# -------------------------------------------------------------------------- end


@dataclass
class Totals:
    """Totals over all steps for the summary at the end: plain numbers, saved in checkpoints.

    Attributes:
        first: the first value of each scalar.
        seconds: by name of a `time/*` scalar.
        tokens: response tokens, summed over all ranks.
    """

    first: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, scalars: Mapping[str, float]) -> None:
        self.first = {**scalars, **self.first}
        for name, value in scalars.items():
            if name.startswith("time/"):
                self.seconds[name] = self.seconds.get(name, 0.0) + value


def report_outcome(job: ResolvedJob, step: int, totals: Totals, last: Mapping[str, float]) -> None:
    """Log the outcome of the job, the time of each phase, and the next commands.

    Args:
        last: the last value of each scalar.
    """
    logger.info("Done: %s steps; everything is in %s", step, job.folder)
    for line in [*_outcome(totals, last), *_next_commands(job, step)]:
        logger.info("%s", line)


def _outcome(totals: Totals, last: Mapping[str, float]) -> list[str]:
    figures = {
        "kl/student_teacher": ("KL to the teacher", ".4f", True),
        "validation/accuracy": ("accuracy", ".1%", True),
        "validation/teacher_accuracy": ("teacher", ".1%", False),
        "validation/gap_recovered": ("gap recovered", ".1%", False),
    }
    parts = []
    for name, (label, form, changes) in figures.items():
        if name in last:
            # The first validation may have been in an earlier start of the run.
            first = f"{totals.first[name]:{form}} -> " if changes and name in totals.first else ""
            parts.append(f"{label} {first}{last[name]:{form}}")
    lines = [f"Outcome: {', '.join(parts)}"] if parts else []
    phases = {n[5:-3]: s for n, s in totals.seconds.items() if n != "time/step(s)" and s >= 0.5}
    longest = sorted(phases.items(), key=lambda row: -row[1])
    if longest:
        spent = ", ".join(f"{name} {duration(s)}" for name, s in longest)
        lines.append(f"Time: {spent}; {totals.tokens:,} response tokens")
    return lines


def _next_commands(job: ResolvedJob, step: int) -> list[str]:
    """Return the commands that show the run, continue it, and load its model."""
    config, folder = job.config, job.folder
    more = f"--training.steps {2 * step}"
    if config.training.epochs:
        more = f"--training.epochs {2 * config.training.epochs}"
    lines = [f"Next: python -m opd_titan.view {folder}"]
    if config.metrics.enable_tensorboard:
        lines.append(f"Next: tensorboard --logdir {folder}/tb  # the page: /#custom_scalars")
    if config.checkpoint.enable:
        lines.append(f"Next: the same command with {more} trains further")
    lines.append(f'Next: AutoModelForCausalLM.from_pretrained("{folder}/hf/latest")')
    return lines
