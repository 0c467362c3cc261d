"""A run in TensorBoard: scalars, a layout of charts, samples, histograms, the recipe.

Everything is in one folder, `<dump_folder>/tb`. `log_freq` limits the number of scalars, and
`metrics.has_details` limits samples and histograms; the recipe is written once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import summary

from opd_titan.config import to_toml
from opd_titan.config.resolve import ResolvedJob
from opd_titan.observability.events import EventFile

BINS = 64
MAX_CHARACTERS = 1500  # of a prompt or a response

# Line n of the chart of a step's seconds is the sum of the first n of these phases.
STACK = ("update", "teacher", "reference", "rollout", "sync", "data")

# The HParams tab, which compares runs, has the options of these tables and these results.
_TABLES = (
    *("student", "teacher", "reference", "data", "rollout", "distill", "optimizer"),
    *("lr_scheduler", "training"),
)
_RESULTS = ("kl/student_teacher", "validation/accuracy", "validation/gap_recovered")

# The scalars of each chart, by group; * stands for any text. A chart with a scalar that ends in
# _high shows a value with its interval; the others show lines.
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
        "Seconds of a step by phase, stacked": (
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

_TAGS = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags}


def chart_scalars(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return `charts/*`: scalars in the form that the layout needs.

    In a custom chart TensorBoard 2.21 draws no line for a name with parentheses, so these scalars
    are copied without their unit. It cannot stack areas either, so `charts/stacked_*` are running
    sums over the phases in `STACK`. The time of a phase is the distance to the line below it. The
    distance up to `charts/time_step` is time outside of any phase.
    """
    total, charts = 0.0, {}
    for i, phase in enumerate(STACK, 1):
        if f"time/{phase}(s)" in scalars:
            total += scalars[f"time/{phase}(s)"]
            charts[f"charts/stacked_{i}_{phase}"] = total
    for name, value in scalars.items():
        copy = f"charts/{name.partition('(')[0].replace('/', '_')}"
        if "(" in name and copy in _TAGS:
            charts[copy] = value
    return charts


def layout_of(names: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the argument of `summary.custom_scalars`: the charts of `LAYOUT` that have a scalar.

    Args:
        names: the run's scalars so far.
    """
    # Every run ends with an export, but its time is not known when the layout is written.
    names = {*names, "time/checkpoint(s)"}
    names |= chart_scalars(dict.fromkeys(names, 0.0)).keys()
    groups = {
        group: {title: chart for title, tags in charts.items() if (chart := _chart(tags, names))}
        for group, charts in LAYOUT.items()
    }
    return {group: charts for group, charts in groups.items() if charts}


def _chart(tags: Sequence[str], names: Collection[str]) -> list[Any] | None:
    found = [tag for tag in tags if any(fnmatchcase(name, tag) for name in names)]
    if tags[-1].endswith("_high"):
        return ["Margin", list(tags)] if len(found) == 3 else None
    # Lines are selected by regular expressions, which match from the start of a name.
    return ["Multiline", [tag.replace("*", ".*") + "$" for tag in found]] if found else None


def as_code(text: str, limit: int) -> str:
    """Return the text as a Markdown code block, so that nothing in it is markup.

    Args:
        limit: the longest text in characters; a note replaces the middle of a longer one.
    """
    if len(text) > limit:
        head = limit * 2 // 3
        cut = len(text) - limit
        text = f"{text[:head]} [... {cut:,} characters ...] {text[head - limit :]}"
    # Programs differ in which control characters end a line.
    plain = "".join(c if c.isprintable() or c in "\n " else ascii(c)[1:-1] for c in text)
    return "\n".join("    " + line for line in plain.split("\n"))


def samples_text(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return rows of (prompt, response, grade) as Markdown."""
    parts = []
    for prompt, response, grade in rows:
        prompt, response = as_code(prompt, MAX_CHARACTERS), as_code(response, MAX_CHARACTERS)
        # Without a line between them Markdown would merge the code blocks.
        parts += ["**Prompt**", prompt, "**Response**", response, "**Grade**", as_code(grade, 200)]
    return "\n\n".join(parts)


def hyperparameters(job: ResolvedJob) -> dict[str, bool | int | float | str]:
    """Return the hyper-parameters of a run: models, data, and the options of training."""
    values = {
        f"{table}.{key}": value
        for table in _TABLES
        for key, value in asdict(getattr(job.config, table)).items()
    }
    plain = (bool, int, float, str)
    return {name: v if isinstance(v, plain) else str(v) for name, v in values.items()}


class Dashboard:
    """The event file of one start of a job, written by one rank.

    TensorBoard drops the events of earlier starts for the steps that are repeated. The recipe is
    written at step 0 by the first start, and stays.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        """
        Args:
            folder: `<dump_folder>/tb`.
            start_step: the last completed step, 0 for a new run.
        """
        self._new = start_step == 0 or not any(folder.glob("events.out.tfevents.*"))
        self._layout: dict[str, dict[str, list[Any]]] = {}  # the newest that was written
        # A new run starts with a validation at step 0, a resumed one after start_step.
        self._file = EventFile(folder, start_step + 1 if start_step else 0)

    def describe(self, job: ResolvedJob) -> None:
        """Write the resolved recipe of the first start, as text and as hyper-parameters."""
        if self._new:
            self._file.add_summary(summary.text("config", as_code(to_toml(job.config), 100_000)), 0)
            experiment, start, _ = summary.hparams(
                hyperparameters(job), dict.fromkeys(_RESULTS, 0.0)
            )
            self._file.add_summary(experiment, 0)
            self._file.add_summary(start, 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        tags = {**values, **chart_scalars(values)}
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
        self._file.add_summary(Summary(value=points), step)

    def layout(self, step: int, names: Collection[str]) -> None:
        """Write the layout of these scalars if it has changed; TensorBoard shows the newest.

        A layout may grow: some scalars appear only with the first samples of the student, or with
        the first validation.
        """
        found = layout_of(names)
        if found != self._layout:
            self._layout = found
            self._file.add_summary(summary.custom_scalars(found), step)

    def assume_layout(self, names: Collection[str]) -> None:
        """Assume that an earlier start of the run has written the layout of these scalars."""
        if not self._new:
            self._layout = layout_of(names)

    def histogram(self, step: int, name: str, values_N: Tensor) -> None:
        """Write a histogram of the finite values with `BINS` equal bins; nothing without values."""
        finite = values_N[values_N.isfinite()].double().cpu().numpy()
        if finite.size:
            self._file.add_summary(summary.histogram(name, finite, BINS), step)

    def samples(self, step: int, rows: Sequence[tuple[str, str, str]]) -> None:
        """Write rows of (prompt, response, grade) as text."""
        self._file.add_summary(summary.text("rollouts", samples_text(rows)), step)

    def close(self) -> None:
        self._file.close()
