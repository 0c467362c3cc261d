"""What TensorBoard's reader finds in a run's folder besides scalars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from opd_titan.config import load_config
from opd_titan.config.resolve import resolve
from opd_titan.observability.metrics import (
    MetricLogger,
    has_details,
    is_scalar,
)
from opd_titan.observability.tensorboard import (
    BINS,
    LAYOUT,
    MAX_CHARACTERS,
    Dashboard,
    chart_scalars,
    samples_text,
)

MODELS = ["--student.hf_path", "s", "--teacher.hf_path", "t", "--data.path", "d"]
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> [link](javascript:alert(1))\n"
    "```\n# Heading\n\u2028<b>bold</b>\r<i>it</i>\x02wzxhzdk:0\x03 \x1b[31m \udc80\n\n    - item"
)


def read(folder: Path) -> EventAccumulator:
    sizes = {"scalars": 0, "tensors": 0, "histograms": 0}
    return EventAccumulator(str(folder / "tb"), size_guidance=sizes).Reload()


def a_run(
    folder: Path, steps: range, start: int = 0, state: dict[str, Any] | None = None
) -> MetricLogger:
    config = load_config(MODELS)
    logger = MetricLogger(folder, start_step=start, total_steps=40)
    assert logger.events is not None
    logger.events.describe(resolve(config, "cpu", 1))
    if state is not None:
        logger.load_state_dict(state)
    if start == 0:
        logger.log_pause(0, {"validation/accuracy": 0.2, "time/validate(s)": 1.0})
    for step in steps:
        seconds = {"time/rollout(s)": 2.0, "time/update(s)": 1.0, "time/step(s)": 3.5}
        kl = {"kl/student_teacher": 0.5, "kl_by_position/1-16": 0.25}
        logger.log(step, {**kl, **seconds, "throughput/rollout(tok/s/gpu)": 9.0})
        if has_details(step, 40):
            logger.events.histogram(step, "log_ratio/student_teacher", torch.randn(100))
            logger.events.samples(step, [("2+2?", "4", "stop")])
    return logger


def layouts(events: EventAccumulator) -> list[layout_pb2.Layout]:
    written = events.Tensors("custom_scalars__config__")
    return [layout_pb2.Layout.FromString(e.tensor_proto.string_val[0]) for e in written]


def charts_of(layout: layout_pb2.Layout) -> list[str]:
    return [chart.title.partition(",")[0] for group in layout.category for chart in group.chart]


def test_every_chart_of_the_layout_has_a_scalar(tmp_path: Path) -> None:
    logger = a_run(tmp_path, range(1, 3))
    logger.log_pause(2, {"time/checkpoint(s)": 1.0})
    events = read(tmp_path)
    names = events.Tags()["scalars"]
    newest = layouts(events)[-1]
    assert [c.title[3:] for c in newest.category] == ["Distance to the teacher", "Speed"]
    for pattern in [t for c in newest.category for x in c.chart for t in x.multiline.tag]:
        assert any(re.match(pattern, name) for name in names), pattern


def test_the_layout_grows_with_what_is_measured(tmp_path: Path) -> None:
    """The first step of a mixture may have no samples of the student; a resumed run may be the
    first to validate. TensorBoard shows the newest layout that there is."""
    logger = MetricLogger(tmp_path, total_steps=9)
    logger.log(1, {"loss/policy": 1.0})
    logger.log(2, {"loss/policy": 1.0, "kl/student_teacher": 0.5})
    logger.log(3, {"loss/policy": 1.0})
    state = logger.state_dict()
    resumed = MetricLogger(tmp_path, start_step=3, total_steps=9)
    resumed.load_state_dict(state)
    resumed.log(4, {"loss/policy": 1.0})
    resumed.log_pause(4, {f"validation/accuracy{end}": 0.5 for end in ("", "_low", "_high")})
    resumed.log(5, {"loss/policy": 1.0, "kl/student_teacher": 0.5})
    kl, rest = "KL(student || teacher)", ["Loss", "Pauses between steps"]
    found = [charts_of(layout) for layout in layouts(read(tmp_path))]
    assert found == [rest, [kl, *rest], [kl, "Accuracy", *rest]]


def test_the_layout_has_only_scalars_that_exist() -> None:
    tags = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags}
    assert [t for t in tags if not is_scalar(t) and not t.endswith("*")] == []
    # The page takes what is between the first ( and the last ) of "tag (run)" for the run.
    assert [t for t in tags if "(" in t] == []


def test_nothing_is_doubled_or_missing_after_a_resume(tmp_path: Path) -> None:
    a_run(tmp_path / "whole", range(1, 41))
    a_run(tmp_path / "resumed", range(1, 31))  # killed after step 30
    state = a_run(tmp_path / "other", range(1, 21)).state_dict()
    a_run(tmp_path / "resumed", range(21, 41), 20, state)
    # TensorBoard's own process uses this reader, which purges texts too.
    whole, resumed = (
        PluginAccumulator(str(tmp_path / name / "tb"), size_guidance={"tensors": 0}).Reload()
        for name in ("whole", "resumed")
    )
    assert whole.Tags() == resumed.Tags()
    for tag in whole.Tags()["tensors"]:
        steps = [e.step for e in whole.Tensors(tag)]
        assert [e.step for e in resumed.Tensors(tag)] == steps == sorted(set(steps))
    steps = [e.step for e in whole.Tensors("log_ratio/student_teacher")]
    assert steps == [1, *range(2, 41, 2)]


def test_phases_are_stacked() -> None:
    scalars = {"time/rollout(s)": 2.0, "time/update(s)": 1.0, "time/validate(s)": 9.0, "lr": 1.0}
    lines = {"stacked_1_update": 1.0, "stacked_4_rollout": 3.0, "time_validate": 9.0}
    assert chart_scalars(scalars) == {f"charts/{name}": value for name, value in lines.items()}


def test_the_histogram_equals_numpys(tmp_path: Path) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) - 2
    events = Dashboard(tmp_path / "tb", 0)
    odd = torch.tensor([float("nan"), float("inf")])
    events.histogram(1, "log_ratio/student_teacher", torch.cat([values, odd]))
    events.histogram(2, "log_ratio/student_teacher", odd)  # nothing to show
    (event,) = read(tmp_path).Histograms("log_ratio/student_teacher")
    counts, edges = np.histogram(values.double().numpy(), bins=BINS)
    found = event.histogram_value
    assert (found.num, found.min) == (1000, values.min().item())
    limits, buckets = found.bucket_limit, found.bucket
    assert sum(buckets) == 1000 and len(buckets) <= BINS + 1
    numpys = dict(zip(np.round(edges[1:], 6), counts, strict=True))
    mine = dict(zip(np.round(limits, 6), buckets, strict=True))
    assert {k: v for k, v in mine.items() if v} == {k: v for k, v in numpys.items() if v}


def test_text_of_models_is_never_markup(tmp_path: Path) -> None:
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    page = plugin_util.markdown_to_safe_html(samples_text([(HOSTILE, HOSTILE, HOSTILE)]))
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= {"p", "strong", "pre", "code"}, tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    # No response can write its own grade: the three are separate blocks.
    assert page.count("<pre>") == 3
    events = Dashboard(tmp_path / "tb", 0)
    events.samples(1, [(HOSTILE, "x" * 100_000, "stop")])
    (event,) = read(tmp_path).Tensors("rollouts/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "98,500 characters" in text and len(text) < 2 * (MAX_CHARACTERS + 200)


def test_hyperparameters_and_recipe_can_be_read(tmp_path: Path) -> None:
    a_run(tmp_path, range(1, 2))
    assert len(list((tmp_path / "tb").iterdir())) == 1  # no folder of their own
    events = read(tmp_path)
    content = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(
        content["_hparams_/session_start_info"]
    ).session_start_info
    assert start.hparams["optimizer.lr"].number_value == load_config(MODELS).optimizer.lr
    assert start.hparams["student.hf_path"].string_value == "s"
    (event,) = events.Tensors("config/text_summary")
    assert "    [optimizer]" in event.tensor_proto.string_val[0].decode().splitlines()
