"""The metrics of a run: their names, the timing of phases, log windows, and their saved state."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_titan.observability.console import Totals, console_line, terminal_columns
from opd_titan.observability.peaks import Peaks, percent_of_peak

if TYPE_CHECKING:
    from opd_titan.observability.tensorboard import Dashboard

# First and last token, counted from 1, of the parts of a response in `kl_by_position/*`.
POSITIONS = ((1, 16), (17, 64), (65, 256), (257, 1024), (1025, 4096), (4097, None))


def position_name(first: int, last: int | None) -> str:
    return f"kl_by_position/{first}-{last or ''}"


# With several sets, the plain mean over the sets. docs/evaluation.md has the formulas.
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
# All scalars and their meanings. A new scalar is a new row. A word in <> stands for any part of a
# name without a slash.
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
    "policy/top_k_overlap": "share of the student's 16 most likely tokens in the teacher's 16",
    "policy/top_1_agreement": "share of response tokens with the same most likely token",
    "policy/clip_fraction": "share of response tokens with a clipped ratio",
    "policy/ratio_mean": "mean of exp(log S - log S_old) over response tokens",
    "policy/logprob_gap_max": "nats; largest |rollout - update| log-prob of one token",
    "rollout/response_tokens_mean": "tokens, with the stop token",
    "rollout/response_tokens_max": "tokens, with the stop token",
    "rollout/truncated_fraction": "share of responses cut at max_new_tokens",
    "rollout/eos_fraction": "share of responses that ended with a stop token",
    "rollout/idle_share": "share of the ranks' time spent waiting for the slowest rank's samples",
    "rollout/preempted": "sequences that had to wait for KV cache memory, over all ranks",
    "rollout/repetition": "0..1, mean over responses of rollout_writer.repetition",
    "rollout/on_policy_fraction": "share of responses that the student sampled itself",
    # With several data sets.
    "data/<set>/share": "share of the step's sampled responses",
    "data/<set>/kl_student_teacher": "as kl/student_teacher, with the set's own teacher",
    "data/<set>/response_tokens_mean": "as rollout/response_tokens_mean",
    "data/<set>/truncated_fraction": "as rollout/truncated_fraction",
    "grad_norm": "total norm before clipping, mean over the step's updates",
    "skipped_updates": "updates of the step that were skipped, because of a non-finite number",
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
    # docs/throughput.md defines these.
    "throughput/rollout(tok/s/gpu)": "sampled tokens",
    "throughput/teacher(tok/s/gpu)": "tokens through the teacher, prompts included",
    "throughput/update(tok/s/gpu)": "tokens through the student, prompts included",
    "throughput/step(tok/s/gpu)": "response tokens over the whole step's time",
    "mfu/rollout(%)": "of the dense bf16 peak; absent if the device's peak is not known",
    "mfu/teacher(%)": "of the dense bf16 peak",
    "mfu/update(%)": "of the dense bf16 peak; recomputation does not count as work",
    "mbu/rollout(%)": "bytes that decoding must read, as a share of the memory bandwidth",
    "memory/max_active(GiB)": "peak since the last step on CUDA; see memory_scalars for CPU",
    "memory/max_reserved(GiB)": "peak since the last step on CUDA; see memory_scalars for CPU",
    "charts/<figure>": "copies and sums for the chart layout: see tensorboard.chart_scalars",
    **{f"validation/{figure}": meaning for figure, meaning in _VALIDATION.items()},
    **{f"validation/<set>/{figure}": f"validation/{figure} of one set" for figure in _VALIDATION},
    **{position_name(*p): "nats; kl/student_teacher of these tokens alone" for p in POSITIONS},
}

_NAME = re.compile("|".join(re.sub(r"<\w+>", "[^/]+", re.escape(name)) for name in SCALARS))
# By the name in the table: a data set may have "max" in its name.
_MAXIMA = frozenset(name for name in SCALARS if "max" in name)

DETAILED_STEPS = 20  # per run, in addition to the first and the last step


def is_scalar(name: str) -> bool:
    """Return whether `SCALARS` has a row for this name."""
    return _NAME.fullmatch(name) is not None


def has_details(step: int, total_steps: int) -> bool:
    """Return whether TensorBoard gets samples and a histogram of this step.

    It depends on the step alone, so that a resumed run neither repeats nor misses one.
    """
    return step in (1, total_steps) or step % max(1, total_steps // DETAILED_STEPS) == 0


class PhaseClock:
    """Add up wall-clock seconds by phase; the phase "step" is the whole step around them."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._seconds: dict[str, float] = defaultdict(float)

    def _now(self) -> float:
        # Kernels are asynchronous: without this, a phase would include kernels of the previous one.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body and add it to the phase. Phases may nest."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def pop(self) -> dict[str, float]:
        """Return the seconds by phase since the last call, without phases that did not run."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def time_scalars(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return `time/*`, given the seconds by phase."""
    return {f"time/{phase}(s)": value for phase, value in seconds.items()}


def work_scalars(
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
    flops: Mapping[str, float],
    bytes_read: Mapping[str, float],
    *,
    world_size: int,
    peaks: Peaks,
) -> dict[str, float]:
    """Return `throughput/*`, `mfu/*` and `mbu/*` of one step.

    Args:
        seconds: by phase, from `PhaseClock.pop`.
        tokens, flops, bytes_read: by phase, summed over all ranks. A phase may be absent.
        world_size: number of devices, including tensor-parallel ones.
        peaks: of one device. Without a known peak there is no share.
    """
    scalars = {}
    for phase, count in tokens.items():
        if seconds.get(phase):
            scalars[f"throughput/{phase}(tok/s/gpu)"] = count / seconds[phase] / world_size
    for name, work, peak in (("mfu", flops, peaks.flops), ("mbu", bytes_read, peaks.bandwidth)):
        for phase, amount in work.items():
            if peak and seconds.get(phase):
                percent = percent_of_peak(amount, seconds[phase], peak, world_size)
                scalars[f"{name}/{phase}(%)"] = percent
    return scalars


def memory_scalars(device: torch.device | str) -> dict[str, float]:
    """Return `memory/*`, the peak memory of this process in GiB.

    On CUDA: the allocator's peaks since the last call; each call resets them. A CPU has no such
    allocator, and its peak cannot be reset: both values are the largest resident memory of this
    process since it started, including weights, Python and libraries.
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
    # On Linux ru_maxrss survives exec, so a run that a large process starts would report the memory
    # of its parent. VmHWM is only of this process.
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class MetricLogger:
    """Collect the scalars of each step, and write them to TensorBoard every `log_freq` steps.

    A window ends at step 1, at each multiple of `log_freq` and at the last step. The value of a
    window is the mean over its steps that have the scalar, or the maximum if the scalar is itself a
    maximum. Scalars from between steps (validation, checkpoints) are written at once.

    On resume the events continue in the same folder, and `load_state_dict` restores a half-filled
    window. Log a step before its checkpoint is saved, so that a crash after the checkpoint loses
    nothing.
    """

    def __init__(
        self,
        dump_folder: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        log_freq: int = 1,
        enable_tensorboard: bool = True,
        rank: int = 0,
    ) -> None:
        """
        Args:
            dump_folder: rank 0 writes events to its `tb/`.
            total_steps: the run's last step.
            start_step: the last completed step, 0 for a new run.
        """
        self.total_steps, self.log_freq = total_steps, log_freq
        self.last: dict[str, float] = {}  # the newest value of each scalar
        self.totals = Totals()
        self._validated_at: int | None = None
        self._step: dict[str, float] = {}  # the newest step, which may lack scalars of others
        self._window: dict[str, list[float]] = {}
        self._began: tuple[int, float] | None = None  # first step of this process, when it ended
        self.events: Dashboard | None = None
        if rank == 0 and enable_tensorboard:
            from opd_titan.observability.tensorboard import Dashboard

            self.events = Dashboard(Path(dump_folder) / "tb", start_step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record a step.

        Raises:
            ValueError: `SCALARS` lacks a name.
        """
        self._step = self._take(scalars)
        self._began = self._began or (step, time.monotonic())
        for name, value in self._step.items():
            self._window.setdefault(name, []).append(value)
        if self.due(step):
            self._write(step, {n: _aggregate(n, values) for n, values in self._window.items()})
            self._window = {}

    def log_pause(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars from after a step, before the next one.

        Raises:
            ValueError: `SCALARS` lacks a name.
        """
        self._write(step, self._take(scalars))

    def _take(self, scalars: Mapping[str, float]) -> dict[str, float]:
        for name in scalars:
            if not is_scalar(name):
                raise ValueError(f"unknown scalar {name!r}; give it a row in metrics.SCALARS")
        values = {name: float(value) for name, value in scalars.items()}
        self.last |= values
        self.totals.add(values)
        return values

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self.events is not None and values:
            self.events.layout(step, self.last)
            self.events.scalars(step, values)

    def due(self, step: int) -> bool:
        """Return whether the step ends a window, so that it is written and printed."""
        return step == 1 or step % self.log_freq == 0 or step == self.total_steps

    def seconds_left(self, step: int) -> float | None:
        """Return the estimated time to the end; None in this process's first step.

        The estimate uses the mean time of its later steps, with all pauses.
        """
        if self._began is None or step == self._began[0]:
            return None
        first, when = self._began
        return (time.monotonic() - when) / (step - first) * (self.total_steps - step)

    def validated(self, step: int, found: Mapping[str, float]) -> None:
        """Replace the known `validation/*`, because results of other steps may not be comparable.

        An export and a checkpoint need the result before `log_pause` records it.
        """
        self.last = _without_validation(self.last) | dict(found)
        self._validated_at = step

    def results(self, step: int) -> dict[str, float]:
        """Return the newest values. Omit a validation of another step's weights."""
        return dict(self.last) if step == self._validated_at else _without_validation(self.last)

    def console_line(self, step: int) -> str:
        """Return the step's values, the newest validation and the remaining time in one line."""
        validation = {n: v for n, v in self.last.items() if n.startswith("validation/")}
        return console_line(
            step,
            self.total_steps,
            {**validation, **self._step},
            eta_seconds=self.seconds_left(step),
            columns=terminal_columns(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with which a resumed run writes the same as a whole run."""
        return {
            "window": {name: list(values) for name, values in self._window.items()},
            "last": dict(self.last),
            "validated_at": self._validated_at,
            "totals": asdict(self.totals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window = {name: list(values) for name, values in state["window"].items()}
        self.last = dict(state["last"])
        self._validated_at = state["validated_at"]
        self.totals = Totals(**state["totals"])
        if self.events is not None:
            self.events.assume_layout(self.last)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
            self.events = None


def _without_validation(scalars: Mapping[str, float]) -> dict[str, float]:
    return {name: v for name, v in scalars.items() if not name.startswith("validation/")}


def _aggregate(name: str, values: list[float]) -> float:
    if name in _MAXIMA:
        return max(values, key=lambda value: (math.isnan(value), value))
    return sum(values) / len(values)
