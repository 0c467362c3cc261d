"""What TensorBoard shows of a run besides curves: a layout, samples, histograms, the recipe.

Everything lands in the one folder `<dump_folder>/tb`. Events are bounded: scalars by `log_freq`,
samples and histograms to about `RECORDS` steps however long the run, the rest is written once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_titan.config import JobConfig, to_toml
from opd_titan.config.sets import data_sets, teachers
from opd_titan.observability.events import Events

# Steps of a run that leave samples and a histogram, its first and last one aside.
RECORDS = 20
BINS = 64
SHOWN_SAMPLES, SHOWN_CHARACTERS = 3, 1500

# What the phases of a step add up to, from the ground: line n is the sum of the first n.
STACK = ("update", "teacher", "reference", "rollout", "sync", "data")

_TABLES = ("rollout", "distill", "reference", "optimizer", "lr_scheduler", "training")
_OUTCOMES = ("kl/student_teacher", "validation/accuracy", "validation/gap_recovered")

# By group, each chart's scalars; * in a name stands for anything. A chart whose last name ends in
# _high is a margin, a value between its two ends; the others are lines.
LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "1. Distance to the teacher": {
        "KL(student || teacher), nats per token": (
            "kl/student_teacher",
            "kl/reverse",
            "kl/forward",
            "kl/student_reference",
        ),
        "Gap recovered, with its 95 % interval": tuple(
            f"validation/gap_recovered{end}" for end in ("", "_low", "_high")
        ),
        "Accuracy, with its 95 % interval": tuple(
            f"validation/accuracy{end}" for end in ("", "_low", "_high")
        ),
        "KL by position in the response": ("kl_by_position/*",),
        "KL to its teacher by data set, nats per token": ("data/*/kl_student_teacher",),
        "log S - log T of single tokens: 1st and 99th percentile": ("kl/p1", "kl/p99"),
        "Agreement with the teacher": ("policy/top_k_overlap", "policy/top_1_agreement"),
    },
    "2. Health": {
        "Response tokens": ("rollout/response_tokens_mean", "rollout/response_tokens_max"),
        "Truncated, repetitive": ("rollout/truncated_fraction", "rollout/repetition"),
        "Entropy, nats per token": ("policy/entropy", "policy/teacher_entropy"),
        "Gradient norm": ("grad_norm",),
        "Loss": ("loss/policy",),
        "Rollout against update log-probs, clipped share": (
            "policy/logprob_gap_max",
            "policy/clip_fraction",
        ),
    },
    "3. Speed": {
        "Tokens per second and device": tuple(
            f"charts/throughput_{p}" for p in ("rollout", "teacher", "update", "step")
        ),
        "Where a step's seconds go: lines stacked": (
            *(f"charts/stacked_{i}_{p}" for i, p in enumerate(STACK, 1)),
            "charts/time_step",
        ),
        "Percent of the device's peak": (
            "charts/mfu_rollout",
            "charts/mfu_teacher",
            "charts/mfu_update",
            "charts/mbu_rollout",
        ),
        "Pauses between steps, seconds": ("charts/time_validate", "charts/time_checkpoint"),
    },
    "4. Memory": {
        "Peak, GiB": ("charts/memory_max_active", "charts/memory_max_reserved"),
        "Sequences that waited for the KV cache": ("rollout/preempted",),
    },
}

_SHOWN = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags}


def charted(scalars: Mapping[str, float]) -> dict[str, float]:
    """`charts/*`, what the layout shows in another form than the scalars have.

    TensorBoard's custom scalars draw no line whose name has parentheses (2.21: it takes them for
    those around the run's name): such scalars come again without their unit. And they cannot stack
    areas. Of the lines `charts/stacked_*`, each phase's seconds and those of the phases below it, a
    phase's time is the gap to the line below; the gap up to `charts/time_step` is what no phase
    accounts for.
    """
    total, lines = 0.0, {}
    for i, phase in enumerate(STACK, 1):
        if f"time/{phase}(s)" in scalars:
            total += scalars[f"time/{phase}(s)"]
            lines[f"charts/stacked_{i}_{phase}"] = total
    for name, value in scalars.items():
        copy = f"charts/{name.partition('(')[0].replace('/', '_')}"
        if "(" in name and copy in _SHOWN:
            lines[copy] = value
    return lines


def layout_of(names: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """For `SummaryWriter.add_custom_scalars`: `LAYOUT` without what a run does not measure.

    Args:
        names: of the run's scalars; what follows from them, or comes at its end, is there too.
    """
    later = dict.fromkeys(names, 0.0)
    if "time/step(s)" in names:
        later["time/checkpoint(s)"] = 0.0
    there = {*names, *charted(later)}
    groups = {
        group: {title: chart for title, tags in charts.items() if (chart := _chart(tags, there))}
        for group, charts in LAYOUT.items()
    }
    return {group: charts for group, charts in groups.items() if charts}


def _chart(tags: Sequence[str], names: Collection[str]) -> list[Any] | None:
    there = [tag for tag in tags if any(fnmatchcase(name, tag) for name in names)]
    if tags[-1].endswith("_high"):
        return ["Margin", there] if len(there) == 3 else None
    # Lines are chosen by regular expressions, which match from the start.
    return ["Multiline", [tag.replace("*", ".*") + "$" for tag in there]] if there else None


def as_code(text: str, limit: int) -> str:
    """Text as a block of Markdown that is shown as it stands, whatever it holds.

    Args:
        limit: of characters; what is more is cut out of the middle, and said to be.
    """
    if len(text) > limit:
        head = limit * 2 // 3
        cut = len(text) - limit
        text = f"{text[:head]} [... {cut:,} characters ...] {text[head - limit :]}"
    # Control characters could end a line for one reader and not for another.
    plain = "".join(c if c.isprintable() or c in "\n " else ascii(c)[1:-1] for c in text)
    return "\n".join("    " + line for line in plain.split("\n"))


def samples_text(rows: Sequence[tuple[str, str, str]]) -> str:
    """Markdown of (prompt, response, its grade)."""
    parts = []
    for prompt, response, grade in rows:
        prompt, response = as_code(prompt, SHOWN_CHARACTERS), as_code(response, SHOWN_CHARACTERS)
        # Each under its name: blocks of code that follow one another are shown as one.
        parts += ["**Prompt**", prompt, "**Response**", response, "**Grade**", as_code(grade, 200)]
    return "\n\n".join(parts)


def hyperparameters(config: JobConfig) -> dict[str, bool | int | float | str]:
    """What people compare runs by: models, data, and the options of learning."""
    found = {
        "student.hf_path": config.student.hf_path,
        "teacher.hf_path": ", ".join(t.hf_path for t in teachers(config)),
        "data.dataset": ", ".join(s.dataset for s in data_sets(config)),
        "data.path": ", ".join(s.path for s in data_sets(config)),
    }
    for table in _TABLES:
        values = asdict(getattr(config, table))
        found |= {f"{table}.{key}": value for key, value in values.items()}
    return {k: v for k, v in found.items() if isinstance(v, (bool, int, float, str))}


class Dashboard:
    """The event files of a job, from one rank.

    On resume the events go on in the same folder; those of steps that will be run again are
    purged. What is written once is at step 0, and stays.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        """
        Args:
            folder: `<dump_folder>/tb`.
            start_step: the last step that was done, 0 for a new run.
        """
        self._new = start_step == 0 or not any(folder.glob("events.out.tfevents.*"))
        self._names: set[str] = set()
        self._layout: dict[str, dict[str, list[Any]]] = {}  # of these
        # A new run starts with a validation at step 0, a resumed one after start_step.
        self._events = Events(folder, start_step + 1 if start_step else 0)

    def describe(self, config: JobConfig) -> None:
        """The resolved recipe, as the run began with it, as text and as hyper-parameters."""
        if not self._new:
            return

        def record(writer: Any) -> None:
            from torch.utils.tensorboard.summary import hparams

            writer.add_text("config", as_code(to_toml(config), 100_000), 0)
            # Not add_hparams, which makes a folder of its own for them.
            about = hparams(hyperparameters(config), dict.fromkeys(_OUTCOMES, 0.0))
            for summary in about[:2]:
                writer._get_file_writer().add_summary(summary, 0)

        self._events.record(0, record)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """On disk before the step's checkpoint is, or a crash leaves a gap."""
        self._events.add(step, {**values, **charted(values)})

    def layout(self, step: int, names: Collection[str]) -> None:
        """When a run's first step is known, and when it turns out to measure something more: some
        steps have none of the student's samples, and a resumed run may validate for the first time.
        TensorBoard shows the newest.

        Args:
            names: of the scalars so far; pauses come later.
        """
        if self._names.issuperset(names):
            return
        self._names.update(names)
        found = layout_of(self._names)
        if found and found != self._layout:
            self._layout = found
            self._events.record(step, lambda writer: writer.add_custom_scalars(found))

    def has_layout_of(self, names: Collection[str]) -> None:
        """Say what the part of the run before this one measured."""
        if not self._new:
            self._names = set(names)
            self._layout = layout_of(names)

    def histogram(self, step: int, name: str, values_N: Tensor) -> None:
        """Of what is finite: `BINS` bins of one width from the least to the largest."""
        finite = values_N[values_N.isfinite()].double().cpu().numpy()
        if finite.size:
            self._events.record(step, lambda w: w.add_histogram(name, finite, step, bins=BINS))

    def samples(self, step: int, rows: Sequence[tuple[str, str, str]]) -> None:
        """(prompt, response, its grade) of the first few."""
        text = samples_text(rows[:SHOWN_SAMPLES])
        self._events.record(step, lambda writer: writer.add_text("rollouts", text, step))

    def close(self) -> None:
        self._events.close()


def is_recorded(step: int, total_steps: int) -> bool:
    """Whether a step leaves samples and a histogram: a pure function, so that a resume neither
    doubles nor misses one."""
    return step in (1, total_steps) or step % max(1, total_steps // RECORDS) == 0
