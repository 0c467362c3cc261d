"""What TensorBoard's own reader finds in a run's folder besides scalars."""

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
from opd_titan.observability.metrics import MetricLogger, is_scalar
from opd_titan.observability.tensorboard import (
    BINS,
    LAYOUT,
    RECORDS,
    SHOWN_CHARACTERS,
    Dashboard,
    as_code,
    charted,
    is_recorded,
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
    logger.events.describe(config)
    if state is not None:
        logger.load_state_dict(state)
    if start == 0:
        logger.log(0, {"validation/accuracy": 0.2, "time/validate(s)": 1.0})
    for step in steps:
        seconds = {"time/rollout(s)": 2.0, "time/update(s)": 1.0, "time/step(s)": 3.5}
        kl = {"kl/student_teacher": 0.5, "kl_by_position/1-16": 0.25}
        logger.log(step, {**kl, **seconds, "throughput/rollout(tok/s/gpu)": 9.0})
        if is_recorded(step, 40):
            logger.events.histogram(step, "log_ratio/student_teacher", torch.randn(100))
            logger.events.samples(step, [("2+2?", "4", "stop")])
    return logger


def layouts(events: EventAccumulator) -> list[layout_pb2.Layout]:
    written = events.Tensors("custom_scalars__config__")
    return [layout_pb2.Layout.FromString(e.tensor_proto.string_val[0]) for e in written]


def test_the_layout_names_what_the_run_measures(tmp_path: Path) -> None:
    a_run(tmp_path, range(1, 3)).close()
    events = read(tmp_path)
    names = events.Tags()["scalars"]
    (found,) = layouts(events)
    assert [c.title[3:] for c in found.category] == ["Distance to the teacher", "Speed"]
    charts = {chart.title: list(chart.multiline.tag) for c in found.category for chart in c.chart}
    patterns = [pattern for tags in charts.values() for pattern in tags]
    for pattern in patterns:
        if "checkpoint" not in pattern:  # comes at the end of every run
            assert any(re.match(pattern, name) for name in names), pattern
    assert "charts/throughput_rollout$" in patterns


def test_a_file_of_the_users_own_stops_no_run(tmp_path: Path) -> None:
    a_run(tmp_path, range(1, 2)).close()
    (tmp_path / "tb" / "events.out.tfevents.before").touch()
    MetricLogger(tmp_path, start_step=1).close()


def test_the_layout_grows_with_what_is_measured(tmp_path: Path) -> None:
    """The first step of a mixture may have none of the student's samples; a resumed run may be the
    first to validate. TensorBoard shows the newest layout that there is."""
    logger = MetricLogger(tmp_path)
    logger.log(1, {"loss/policy": 1.0})
    logger.log(2, {"loss/policy": 1.0, "kl/student_teacher": 0.5})
    logger.log(3, {"loss/policy": 1.0})
    state = logger.state_dict()
    logger.close()
    resumed = MetricLogger(tmp_path, start_step=3)
    resumed.load_state_dict(state)
    resumed.log(4, {"loss/policy": 1.0})
    resumed.log(4, {f"validation/accuracy{end}": 0.5 for end in ("", "_low", "_high")})
    resumed.log(5, {"loss/policy": 1.0, "kl/student_teacher": 0.5})
    resumed.close()
    found = [
        [chart.title.partition(",")[0] for group in each.category for chart in group.chart]
        for each in layouts(read(tmp_path))
    ]
    kl = "KL(student || teacher)"
    assert found == [["Loss"], [kl, "Loss"], [kl, "Accuracy", "Loss"]]


def test_the_layout_knows_only_scalars_that_there_are() -> None:
    tags = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags}
    assert [t for t in tags if not is_scalar(t) and not t.endswith("*")] == []
    # The page takes what is between the first ( and the last ) of "tag (run)" for the run.
    assert [t for t in tags if "(" in t] == []
    assert [name[3:] for name in LAYOUT] == [
        "Distance to the teacher",
        "Health",
        "Speed",
        "Memory",
    ]


def test_nothing_is_doubled_or_missing_after_a_resume(tmp_path: Path) -> None:
    a_run(tmp_path / "whole", range(1, 41)).close()
    crashed = a_run(tmp_path / "resumed", range(1, 31))  # killed after step 30
    state = a_run(tmp_path / "other", range(1, 21)).state_dict()
    a_run(tmp_path / "resumed", range(21, 41), 20, state).close()
    # TensorBoard's own process reads with this one, which purges texts too.
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
    crashed.close()


def test_records_are_bounded_however_long_the_run() -> None:
    for total in (1, 7, 40, 999, 100_000):
        records = sum(is_recorded(step, total) for step in range(1, total + 1))
        assert 1 <= records <= 2 * RECORDS


def test_phases_are_stacked() -> None:
    scalars = {"time/rollout(s)": 2.0, "time/update(s)": 1.0, "time/validate(s)": 9.0, "lr": 1.0}
    lines = {"stacked_1_update": 1.0, "stacked_4_rollout": 3.0, "time_validate": 9.0}
    assert charted(scalars) == {f"charts/{name}": value for name, value in lines.items()}


def test_the_histogram_is_numpys(tmp_path: Path) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) - 2
    events = Dashboard(tmp_path / "tb", 0)
    odd = torch.tensor([float("nan"), float("inf")])
    events.histogram(1, "log_ratio/student_teacher", torch.cat([values, odd]))
    events.histogram(2, "log_ratio/student_teacher", odd)  # nothing to show
    events.close()
    (event,) = read(tmp_path).Histograms("log_ratio/student_teacher")
    counts, edges = np.histogram(values.double().numpy(), bins=BINS)
    found = event.histogram_value
    assert (found.num, found.min) == (1000, values.min().item())
    limits, buckets = found.bucket_limit, found.bucket
    assert sum(buckets) == 1000 and len(buckets) <= BINS + 1
    numpys = dict(zip(np.round(edges[1:], 6), counts, strict=True))
    mine = dict(zip(np.round(limits, 6), buckets, strict=True))
    assert {k: v for k, v in mine.items() if v} == {k: v for k, v in numpys.items() if v}


def test_text_of_models_is_no_markup(tmp_path: Path) -> None:
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    page = plugin_util.markdown_to_safe_html(samples_text([(HOSTILE, HOSTILE, HOSTILE)]))
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= {"p", "strong", "pre", "code"}, tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    # No response can write its own grade: each of the three is a block of its own.
    assert page.count("<pre>") == 3
    events = Dashboard(tmp_path / "tb", 0)
    events.samples(1, [(HOSTILE, "x" * 100_000, "stop")] * 9)
    events.close()
    (event,) = read(tmp_path).Tensors("rollouts/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "98,500 characters" in text and len(text) < 3 * 2 * (SHOWN_CHARACTERS + 200)
    assert as_code("short", 10) == "    short"


def test_hyperparameters_and_recipe_can_be_read(tmp_path: Path) -> None:
    a_run(tmp_path, range(1, 2)).close()
    assert [path.name for path in tmp_path.iterdir()] == ["tb"]
    assert not any(path.is_dir() for path in (tmp_path / "tb").iterdir())
    events = read(tmp_path)
    content = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(
        content["_hparams_/session_start_info"]
    ).session_start_info
    assert start.hparams["optimizer.lr"].number_value == load_config(MODELS).optimizer.lr
    assert start.hparams["student.hf_path"].string_value == "s"
    (event,) = events.Tensors("config/text_summary")
    assert "    [optimizer]" in event.tensor_proto.string_val[0].decode().splitlines()
