"""What people read while a job runs: its plan at the start, a line a step, its outcome."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opd_titan.config import JobConfig
from opd_titan.observability.logging import paint

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("opd_titan")

# Before every line on the console: the clock.
_MARGIN = len("[00:00:00] ")


@dataclass(frozen=True)
class _Column:
    """One figure of the step line.

    Attributes:
        rank: those with the highest go first where the terminal is narrow; those of 0 stay.
    """

    scalar: str
    text: str
    rank: int
    tint: str | None = None


def _rate(value: float) -> str:
    """4.9k where 4,893 would be too precise for a glance."""
    if not math.isfinite(value) or value < 1000:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if value < 1e5 else f"{value / 1e3:,.0f}k"


# In the order of the line. Absent scalars leave no hole.
_COLUMNS = (
    _Column("kl/student_teacher", "kl {:.4f}", 0, "green"),
    _Column("validation/gap_recovered", "gap recovered {:.1%}", 0, "green"),
    _Column("rollout/response_tokens_mean", "len {:.1f}", 1, "blue"),
    _Column("rollout/truncated_fraction", "cut {:.1%}", 1, "blue"),
    _Column("eta", "eta {}", 2),
    _Column("throughput/rollout(tok/s/gpu)", "rollout {} tok/s", 3, "cyan"),
    _Column("throughput/update(tok/s/gpu)", "update {} tok/s", 4, "cyan"),
    _Column("memory/max_reserved(GiB)", "mem {:.2f} GiB", 5),
    _Column("throughput/teacher(tok/s/gpu)", "teacher {} tok/s", 6, "cyan"),
    _Column("loss/policy", "loss {:.4f}", 7, "yellow"),
    _Column("grad_norm", "grad {:.3f}", 8, "magenta"),
    _Column("time/step(s)", "{:.2f} s/step", 9),
    _Column("lr", "lr {:.2e}", 10),
)


def console_line(
    step: int,
    total_steps: int,
    scalars: Mapping[str, float],
    *,
    color: bool = False,
    eta_seconds: float | None = None,
    columns: int | None = None,
) -> str:
    """One line for people. What is not finite stands out in red, says so, and is never left out.

    Args:
        columns: of the terminal; what matters least is left out to fit. None: all is shown.
    """
    width = len(str(total_steps))
    parts: list[tuple[int, str | None, str]] = [(0, "red", f"step {step:>{width}}/{total_steps}")]
    for c in _COLUMNS:
        if c.scalar == "eta" and eta_seconds is not None:
            parts.append((c.rank, c.tint, c.text.format(duration(eta_seconds))))
        elif c.scalar in scalars:
            value = scalars[c.scalar]
            shown = c.text.format(_rate(value) if "tok/s" in c.text else value)
            if math.isfinite(value):
                parts.append((c.rank, c.tint, shown))
            else:
                parts.append((0, "red", f"{shown} (!)"))
    odd = [name for name in scalars if not math.isfinite(scalars[name])]
    odd = [name for name in odd if name not in {c.scalar for c in _COLUMNS}]
    if odd:
        parts.append((0, "red", f"not finite (!): {', '.join(odd)}"))
    while columns is not None and _width(parts) + _MARGIN > columns:
        least = max(rank for rank, _, _ in parts)
        if least == 0:
            break
        parts = [part for part in parts if part[0] != least]
    return "  ".join(paint(text, tint) if color and tint else text for _, tint, text in parts)


def _width(parts: Iterable[tuple[int, str | None, str]]) -> int:
    return sum(len(text) + 2 for _, _, text in parts) - 2


def terminal_columns() -> int | None:
    """How wide the terminal is; None where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# ------------------------------------------------------------------------ start


def report_job(
    config: JobConfig,
    total_steps: int,
    dtype: torch.dtype,
    student: nn.Module,
    frozen: Mapping[str, nn.Module],
) -> None:
    """Say what the job will do, what its models take on this rank, and where things land.

    Args:
        dtype: that models compute in.
        frozen: the other models by role.
    """
    r, folder = config.rollout, config.job.dump_folder
    name = str(dtype).removeprefix("torch.")
    masters = "" if name == "float32" else ", the student's masters in float32"
    logger.info(
        f"Job: {config.distill.objective}, {total_steps:,} steps of {r.prompts_per_step} prompts x "
        f"{r.group_size} responses of up to {r.max_new_tokens:,} tokens, in {name}{masters}"
    )
    logger.info("Memory: %s, before activations and rollouts", _memory(student, frozen))
    there = {
        "tb/": config.metrics.enable_tensorboard,
        "rollouts/": config.metrics.sample_rollouts != 0,
        "checkpoint/": config.checkpoint.enable,
        "hf/": True,
        "logs/": True,
    }
    logger.info("Files: %s: %s", folder, ", ".join(name for name, kept in there.items() if kept))


def _memory(student: nn.Module, frozen: Mapping[str, nn.Module]) -> str:
    trained, others = _bytes(student), {role: _bytes(model) for role, model in frozen.items()}
    parts = [
        f"student {_size(trained)}",
        f"gradients {_size(trained)}",
        f"Adam {_size(2 * trained)}",
    ]
    parts += [f"{role} {_size(count)}" for role, count in others.items()]
    return f"{_size(4 * trained + sum(others.values()))} a rank ({', '.join(parts)})"


def _bytes(model: nn.Module) -> int:
    """Of this rank's share."""
    local: list[Any] = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in local)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# -------------------------------------------------------------------------- end


@dataclass
class Totals:
    """What a job's summary needs of all its steps. Plain numbers, to go into its checkpoints.

    Attributes:
        first: the first value of each scalar.
        seconds: by name of a `time/*` scalar.
        tokens: of responses, over all ranks.
    """

    first: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.first.setdefault(name, value)
            if name.startswith("time/"):
                self.seconds[name] = self.seconds.get(name, 0.0) + value


def report_outcome(config: JobConfig, step: int, totals: Totals, last: Mapping[str, float]) -> None:
    """Say what was achieved, what the time went into, and what to do next.

    Args:
        last: the last value of each scalar.
    """
    logger.info("Done: %s steps; everything is in %s", step, config.job.dump_folder)
    for line in [*_achieved(totals, last), *_next_commands(config, step)]:
        logger.info("%s", line)


def _achieved(totals: Totals, last: Mapping[str, float]) -> list[str]:
    first, kl, right = totals.first, "kl/student_teacher", "validation/accuracy"
    parts = []
    if kl in last:
        parts.append(f"KL to the teacher {_began(first, kl, '.4f')}{last[kl]:.4f}")
    if right in last:
        parts.append(f"accuracy {_began(first, right, '.1%')}{last[right]:.1%}")
    if "validation/teacher_accuracy" in last:
        parts.append(f"teacher {last['validation/teacher_accuracy']:.1%}")
    if "validation/gap_recovered" in last:
        parts.append(f"gap recovered {last['validation/gap_recovered']:.1%}")
    lines = [f"Outcome: {', '.join(parts)}"] if parts else []
    phases = {n[5:-3]: s for n, s in totals.seconds.items() if n != "time/step(s)" and s >= 0.5}
    ordered = sorted(phases.items(), key=lambda row: -row[1])
    spent = ", ".join(f"{name} {duration(s)}" for name, s in ordered)
    if spent:
        lines.append(f"Time: {spent}; {totals.tokens:,} response tokens")
    return lines


def _began(first: Mapping[str, float], name: str, form: str) -> str:
    """A checkpoint knows what was found just before it was saved, but not as part of a step."""
    return f"{first[name]:{form}} -> " if name in first else ""


def _next_commands(config: JobConfig, step: int) -> list[str]:
    """To look at the run, to go on with it, and to use what it made."""
    folder = config.job.dump_folder
    more = f"--training.steps {2 * step}"
    if config.training.epochs:
        more = f"--training.epochs {2 * config.training.epochs}"
    lines = [f"Next: python -m opd_titan.view {folder}"]
    if config.metrics.enable_tensorboard:
        lines.append(f"Next: tensorboard --logdir {folder}/tb  # the page: /#custom_scalars")
    if config.checkpoint.enable:
        lines.append(f"Next: the same command with {more} goes on from here")
    lines.append(f'Next: AutoModelForCausalLM.from_pretrained("{folder}/hf/latest")')
    return lines
