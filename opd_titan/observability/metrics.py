"""The run's numbers: which there are, how phases are timed, where the scalars go."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from opd_titan.observability.console import Totals, console_line, terminal_columns
from opd_titan.observability.logging import use_color
from opd_titan.observability.peaks import Peaks, percent_of_peak
from opd_titan.observability.tensorboard import Dashboard

# First and last token, from 1, of the parts of a response that `kl_by_position/*` are about.
POSITIONS = ((1, 16), (17, 64), (65, 256), (257, 1024), (1025, 4096), (4097, None))


def position_name(first: int, last: int | None) -> str:
    return f"kl_by_position/{first}-{last or ''}"


# Of several sets: the plain mean of the sets' own figures. docs/evaluation.md has the formulas.
_VALIDATION = {
    "accuracy": "share of held-out responses that are right, or their mean score",
    "accuracy_low": "lower end of its 95 % interval",
    "accuracy_high": "upper end of its 95 % interval",
    "pass_at_<k>": "probability that one of k samples of a prompt is right",
    "teacher_accuracy": "accuracy of the teacher, measured once",
    "gap_recovered": "(student - start) / (teacher - start)",
    "gap_recovered_low": "lower end of its 95 % interval",
    "gap_recovered_high": "upper end of its 95 % interval",
    "response_tokens_mean": "tokens",
}
# Every scalar there is, in the order of the design. A new one is one row. What is between < and >
# stands for a part of the name that has no slash.
SCALARS: dict[str, str] = {
    "loss/policy": "the objective, summed over response tokens / their global number",
    "kl/student_teacher": "nats per response token, from the student's samples",
    "kl/student_reference": "nats per response token, from the student's samples",
    "kl/p1": "nats; 1st percentile over response tokens of the student-teacher term",
    "kl/p99": "nats; 99th percentile over response tokens of the student-teacher term",
    "kl/reverse": "nats per response token; exact KL(student || teacher) over the vocabulary",
    "kl/forward": "nats per response token; exact KL(teacher || student) over the vocabulary",
    "policy/entropy": "nats per response token",
    "policy/teacher_entropy": "nats per response token, at the student's prefixes",
    "policy/top_k_overlap": "share of the student's 16 likeliest tokens among the teacher's",
    "policy/top_1_agreement": "share of response tokens with the same likeliest token",
    "policy/clip_fraction": "share of response tokens whose ratio was clipped",
    "policy/ratio_mean": "mean of exp(log S - log S_old) over response tokens",
    "policy/logprob_gap_max": "nats; largest |rollout - update| log-prob of one token",
    "rollout/response_tokens_mean": "tokens, the stop token included",
    "rollout/response_tokens_max": "tokens, the stop token included",
    "rollout/truncated_fraction": "share of responses cut at max_new_tokens",
    "rollout/eos_fraction": "share of responses that ended by themselves",
    "rollout/idle_share": "0..1, of the ranks' time: waiting for the rank that samples longest",
    "rollout/preempted": "sequences that waited for memory of the KV cache, over all ranks",
    "rollout/repetition": "0..1, mean over responses of rollout_writer.repetition",
    "rollout/on_policy_fraction": "share of responses that the student sampled, not the data set",
    # By data set, where there are several.
    "data/<set>/share": "of the step's sampled responses",
    "data/<set>/kl_student_teacher": "as kl/student_teacher, against the set's own teacher",
    "data/<set>/response_tokens_mean": "as rollout/response_tokens_mean",
    "data/<set>/truncated_fraction": "as rollout/truncated_fraction",
    "grad_norm": "total norm before clipping, mean over the step's updates",
    "skipped_updates": "updates of the step that were not made: loss or gradient was not finite",
    "lr": "learning rate",
    "time/data(s)": "seconds on rank 0: prompts",
    "time/rollout(s)": "seconds on rank 0: sampling",
    "time/teacher(s)": "seconds on rank 0: teacher's scores",
    "time/reference(s)": "seconds on rank 0: reference's scores",
    "time/update(s)": "seconds on rank 0: forward, backward, optimizer",
    "time/sync(s)": "seconds on rank 0: new weights into the rollout engine",
    "time/checkpoint(s)": "seconds on rank 0 that the loop waited for a checkpoint or export",
    "time/validate(s)": "seconds on rank 0: validation",
    "time/step(s)": "seconds on rank 0: from prompts to the end of the update",
    # What exactly these count: docs/throughput.md
    "throughput/rollout(tok/s/gpu)": "sampled tokens",
    "throughput/teacher(tok/s/gpu)": "tokens through the teacher, prompts included",
    "throughput/update(tok/s/gpu)": "tokens through the student, prompts included",
    "throughput/step(tok/s/gpu)": "response tokens over the whole step's time",
    "mfu/rollout(%)": "of the dense bf16 peak; absent where the device's peak is not known",
    "mfu/teacher(%)": "of the dense bf16 peak",
    "mfu/update(%)": "of the dense bf16 peak; recomputation does not count as work",
    "mbu/rollout(%)": "bytes that decoding must read, of the memory bandwidth over the phase",
    "memory/max_active(GiB)": "peak since the last step on CUDA; see memory_stats for CPU",
    "memory/max_reserved(GiB)": "peak since the last step on CUDA; see memory_stats for CPU",
    "charts/<figure>": "a copy or a running sum that the layout shows, see tensorboard.charted",
    **{f"validation/{figure}": meaning for figure, meaning in _VALIDATION.items()},
    **{f"validation/<set>/{figure}": f"validation/{figure} of one set" for figure in _VALIDATION},
    **{position_name(*p): "nats; kl/student_teacher of these tokens alone" for p in POSITIONS},
}

_PATTERNS = [
    re.compile("[^/]+".join(map(re.escape, re.split(r"<\w+>", name))))
    for name in SCALARS
    if "<" in name
]


def is_scalar(name: str) -> bool:
    """Whether `SCALARS` has a row for this name."""
    return name in SCALARS or any(pattern.fullmatch(name) for pattern in _PATTERNS)


UNKNOWN = Peaks()

# Not by a part of the name: a data set may be called anything.
LARGEST = frozenset(name for name in SCALARS if "max" in name)

RARE = ("validation/", "time/validate", "time/checkpoint")

PHASES = (
    "data",
    "rollout",
    "teacher",
    "reference",
    "update",
    "sync",
    "checkpoint",
    "validate",
)


class PhaseClock:
    """Adds up wall-clock seconds by phase; the phase "step" is the whole step around them."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._seconds: dict[str, float] = defaultdict(float)

    def _now(self) -> float:
        # Kernels are asynchronous: without this a phase would pay for the one before it.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body. Entered several times, a phase is the sum; phases may nest."""
        if name not in PHASES and name != "step":
            raise ValueError(f"unknown phase {name!r}; one of {', '.join(PHASES)}, step")
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def pop(self) -> dict[str, float]:
        """Seconds by phase since the last call; phases that were not entered are absent."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def phase_scalars(
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
    flops: Mapping[str, float],
    bytes_read: Mapping[str, float],
    *,
    world_size: int = 1,
    peaks: Peaks = UNKNOWN,
) -> dict[str, float]:
    """`time/*`, `throughput/*`, `mfu/*` and `mbu/*` of one step.

    Args:
        seconds: by phase, as `PhaseClock.pop` gives them.
        tokens, flops, bytes_read: by phase, of all ranks together; a phase may be absent from
            any of them.
        world_size: number of devices, all of them, tensor-parallel ones included.
        peaks: of one device; there is no share of a peak that is not known.
    """
    scalars = {f"time/{phase}(s)": value for phase, value in seconds.items()}
    for phase, count in tokens.items():
        if seconds.get(phase):
            scalars[f"throughput/{phase}(tok/s/gpu)"] = count / seconds[phase] / world_size
    for name, work, peak in (("mfu", flops, peaks.flops), ("mbu", bytes_read, peaks.bandwidth)):
        for phase, amount in work.items():
            if peak and seconds.get(phase):
                percent = percent_of_peak(amount, seconds[phase], peak, world_size)
                scalars[f"{name}/{phase}(%)"] = percent
    return scalars


def memory_stats(device: torch.device | str) -> dict[str, float]:
    """Peak memory of this process, in GiB.

    On CUDA: the allocator's peaks since the last call, which also resets them. A CPU has no such
    allocator and its peak cannot be reset: both values are the largest resident memory of this
    process since it started, weights, Python and libraries included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        torch.cuda.reset_peak_memory_stats(device)
        active = stats.get("active_bytes.all.peak", 0) / 2**30
        reserved = stats.get("reserved_bytes.all.peak", 0) / 2**30
    else:
        active = reserved = peak_resident_bytes() / 2**30
    return {"memory/max_active(GiB)": active, "memory/max_reserved(GiB)": reserved}


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    # Linux hands a parent's ru_maxrss down through exec, so a run started by a big process would
    # report that one's memory; VmHWM is this process's own.
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class MetricLogger:
    """Takes every step's scalars, writes them to TensorBoard every `log_freq` steps.

    Written are steps 0 and 1, each multiple of `log_freq` and the last step. A written value is
    the mean over the steps since the last one that passed that scalar, but the maximum of what is
    a maximum itself (`LARGEST`). What few steps have (`RARE`) is written as it comes, at its own
    step.

    On resume the events go on in the same folder; those of steps that will be run again are
    purged, and a half-filled window comes back through `state_dict`. So log a step before its
    checkpoint is saved: a crash after the checkpoint then loses none.
    """

    def __init__(
        self,
        dump_folder: Path,
        enable_tensorboard: bool = True,
        log_freq: int = 1,
        rank: int = 0,
        start_step: int = 0,
        color: bool | None = None,
        *,
        total_steps: int | None = None,
    ) -> None:
        """
        Args:
            dump_folder: events go to its `tb/`, from rank 0 only.
            start_step: the last step that was done, 0 for a new run.
            color: of the console line; None decides by the terminal and NO_COLOR.
            total_steps: the run's last step.
        """
        self.log_freq = log_freq
        self.total_steps = total_steps
        self.color = use_color(color)
        self.last: dict[str, float] = {}
        self._validated_at: int | None = None
        self._of_step: dict[str, float] = {}  # the last one, which may lack what others have
        self._window: dict[str, list[float]] = {}
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._steps, self._paused = 0, 0.0  # since the start; seconds
        self.totals = Totals()
        self.events: Dashboard | None = None
        if rank == 0 and enable_tensorboard:
            self.events = Dashboard(Path(dump_folder) / "tb", start_step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record a step's scalars: one call a step, one more if it has `RARE` ones only.

        Raises:
            ValueError: a name that `SCALARS` lacks.
        """
        for name in scalars:
            if not is_scalar(name):
                raise ValueError(f"unknown scalar {name!r}; give it a row in metrics.SCALARS")
        values = {name: float(value) for name, value in scalars.items()}
        self.last.update(values)
        self.totals.add(values)
        for name, value in values.items():
            self._window.setdefault(name, []).append(value)
        rare = [name for name in values if name.startswith(RARE)]
        of_a_step = len(rare) < len(values)
        self._time(step, values)
        if of_a_step:
            self._of_step = values
        due = list(self._window) if self.due(step) and of_a_step else rare
        aggregates = {name: _aggregate(name, self._window.pop(name)) for name in due}
        if self.events is not None and aggregates:
            if self._of_step:
                self.events.layout(step, self.last)
            self.events.scalars(step, aggregates)

    def _time(self, step: int, values: Mapping[str, float]) -> None:
        if "time/step(s)" in values:
            self._step_seconds.append(values["time/step(s)"])
            self._steps += 1
        elif step > 0:
            self._paused += sum(s for name, s in values.items() if name.startswith("time/"))

    def seconds_left(self, step: int, total_steps: int) -> float | None:
        """By the mean of the last 20 steps, and the pauses between all of them since the start."""
        if not self._step_seconds:
            return None
        left = total_steps - step
        seconds = left * sum(self._step_seconds) / len(self._step_seconds)
        if self._steps > 1 and left > 0:
            # This step's own is still to come.
            seconds += (left + 1) * self._paused / (self._steps - 1)
        return seconds

    def validated(self, step: int, found: Mapping[str, float]) -> None:
        """Know `validation/*` of a step's weights before `log` is told, which is after they are
        exported. What was measured before may not compare with it, and is forgotten."""
        self.last = {k: v for k, v in self.last.items() if not k.startswith("validation/")}
        self.last |= found
        self._validated_at = step

    def results(self, step: int) -> dict[str, float]:
        """The last values, but none of the validation of another step's weights."""
        if step == self._validated_at:
            return dict(self.last)
        return {k: v for k, v in self.last.items() if not k.startswith("validation/")}

    def due(self, step: int) -> bool:
        """Whether the step ends a window: then it is written, and shown."""
        return step <= 1 or step % self.log_freq == 0 or step == self.total_steps

    def console_line(self, step: int, total_steps: int) -> str:
        """The step's values in one line, with those of the last validation and the time left."""
        rare = {name: v for name, v in self.last.items() if name.startswith(RARE)}
        return console_line(
            step,
            total_steps,
            {**rare, **self._of_step},
            color=self.color,
            eta_seconds=self.seconds_left(step, total_steps),
            columns=terminal_columns(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The half-filled window (plain numbers), so that a resumed run writes the same values."""
        window = {name: list(values) for name, values in self._window.items()}
        return {
            "window": window,
            "last": dict(self.last),
            "validated_at": self._validated_at,
            "totals": asdict(self.totals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window = {name: list(values) for name, values in state["window"].items()}
        self.last = dict(state["last"])  # an export's card shows them
        self._validated_at = state.get("validated_at")
        if self.events is not None:
            self.events.has_layout_of(self.last)
        self.totals = Totals(**state.get("totals", {}))

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
            self.events = None


def _aggregate(name: str, values: list[float]) -> float:
    if name in LARGEST:
        return max(values, key=lambda value: (math.isnan(value), value))
    return sum(values) / len(values)
