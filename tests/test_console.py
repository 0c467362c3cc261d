"""The console and the log files of each rank."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opd_titan.config import JobConfig
from opd_titan.config.resolve import resolve
from opd_titan.observability.console import Totals, console_line, report_job, report_outcome
from opd_titan.observability.logging import init_logging, paint
from opd_titan.observability.metrics import MetricLogger

SCALARS = {
    "kl/student_teacher": 0.0571,
    "validation/gap_recovered": 0.704,
    "rollout/response_tokens_mean": 812.3,
    "rollout/truncated_fraction": 0.031,
    "throughput/rollout(tok/s/gpu)": 13_745.0,
    "throughput/update(tok/s/gpu)": 7_707.0,
    "loss/policy": 0.0571,
    "grad_norm": 0.55,
    "lr": 1e-6,
}
PROGRAM = f"""
import sys, time
from opd_titan.observability.console import console_line, terminal_columns
from opd_titan.observability.logging import init_logging
from opd_titan.observability.progress import progress
logger = init_logging(None, int(sys.argv[1]))
logger.info(console_line(12, 1000, {SCALARS!r}, eta_seconds=3725, columns=terminal_columns()))
with progress(500, "rollout", "tok") as bar:
    for i in range(5):
        time.sleep(0.12)
        bar.update(100)
        logger.warning("line %d", i)
"""


def printed(columns: int | None, rank: int = 0, **environment: str) -> str:
    """Return what a program writes to a terminal of this width, or to a pipe."""
    kept = ("COLUMNS", "LINES", "NO_COLOR", "OPD_TITAN_LOG_ALL_RANKS")
    env = {k: v for k, v in os.environ.items() if k not in kept} | environment
    command = [sys.executable, "-c", PROGRAM, str(rank)]
    if columns is None:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    subprocess.run(command, env=env, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    stream = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return stream


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", text)


def screen(stream: str) -> list[str]:
    """Return the lines that a terminal shows in the end; a carriage return overwrites."""
    shown = []
    for line in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", stream).split("\n"):
        cells: list[str] = []
        for piece in line.split("\r"):
            cells[: len(piece)] = piece
        shown.append("".join(cells).rstrip())
    return [line for line in shown if line]


# --------------------------------------------------------------------- the console


def test_a_terminal_gets_colors_and_a_bar_that_leaves_lines_whole() -> None:
    stream = printed(80)
    assert "\x1b[32mkl 0.0571" in stream and "\x1b[33mwarning: line 0" in stream
    assert "rollout: " in stream and "tok/s" in stream  # the bar
    first, *rest = screen(stream)
    assert len(first) <= 80 and "kl 0.0571  gap recovered 70.4%" in first
    lines = [re.sub(r"^\[[\d:]+\] ", "", line) for line in rest]
    assert lines == [f"warning: line {i}" for i in range(5)]


def test_a_pipe_gets_all_figures_and_no_control_characters() -> None:
    out = printed(None)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)
    first, *rest = out.splitlines()
    assert "eta 1:02:05" in first and "lr 1.00e-06" in first
    assert [line.split("] ")[1] for line in rest] == [f"warning: line {i}" for i in range(5)]


@pytest.mark.parametrize(("asked", "lines"), [("0", 0), ("1", 6)])
def test_other_ranks_write_only_if_asked_and_no_color_is_respected(asked: str, lines: int) -> None:
    out = printed(100, rank=3, NO_COLOR="1", OPD_TITAN_LOG_ALL_RANKS=asked)
    assert out.count("rank 3: ") == lines
    assert not re.search(r"\x1b\[3\dm", out)


# -------------------------------------------------------------------- the step line


def test_the_step_line_fits_and_drops_the_least_important_figures() -> None:
    whole = plain(console_line(7, 9, SCALARS, eta_seconds=60))
    figures = whole.split("  ")
    assert len(figures) == 2 + len(SCALARS)
    for columns in range(40, 200, 3):
        line = plain(console_line(7, 9, SCALARS, eta_seconds=60, columns=columns))
        assert len("[00:00:00] " + line) <= columns
        shown = line.split("  ")
        assert shown == figures[: len(shown)]
        if len(shown) < len(figures):
            assert len(f"[00:00:00] {line}  {figures[len(shown)]}") > columns


def test_what_is_not_finite_is_always_named() -> None:
    scalars = {**SCALARS, "grad_norm": math.nan, "kl/p99": math.inf}
    for columns in (None, 20):
        line = plain(console_line(1, 2, scalars, columns=columns))
        assert "not finite: grad_norm, kl/p99" in line and "grad nan" not in line


def test_a_step_does_not_show_the_figures_of_another(tmp_path: Path) -> None:
    """With rollout.on_policy_fraction below 1 a step may have no samples of the student."""
    logger = MetricLogger(tmp_path, enable_tensorboard=False, total_steps=9)
    logger.log(1, {"loss/policy": 1.0, "kl/student_teacher": 0.5, "kl/p99": math.inf})
    logger.log_pause(1, {"validation/gap_recovered": 0.25})
    logger.log(2, {"loss/policy": 2.0})
    line = plain(logger.console_line(2))
    assert "gap recovered 25.0%" in line and "loss 2.0000" in line
    assert "kl" not in line and "not finite" not in line


# ------------------------------------------------------------------------ log files


@pytest.fixture
def _logger_restored() -> Iterator[None]:
    """Leave the program's logger as it was, so that other tests can catch its lines."""
    logger = logging.getLogger("opd_titan")
    before = (list(logger.handlers), logger.level, logger.propagate)
    logger.handlers.clear()
    yield
    for handler in set(logger.handlers) - set(before[0]):
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.usefixtures("_logger_restored")
def test_every_rank_has_a_file_that_a_second_start_appends_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        init_logging(None, rank).warning("early %d", rank)  # before the folder is known
        for word in ("one", "two"):
            logger = init_logging(tmp_path, rank)
            logger.info("%s %s", paint("hello", "green"), word)
            logger.debug("detail")
    out = capsys.readouterr().out.splitlines()
    texts = [re.fullmatch(r"\[\d\d:\d\d:\d\d\] (.*)", line)[1] for line in out]
    assert texts == ["warning: early 0", "hello one", "hello two"]
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        found = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (.*)", x)[1] for x in lines]
        session = ["INFO hello {}", "DEBUG detail"]
        expected = [text.format(word) for word in ("one", "two") for text in session]
        assert found == [f"WARNING early {rank}", *expected]


# ---------------------------------------------------------------- the start, the end


def test_the_start_counts_the_bytes_of_the_models(caplog: pytest.LogCaptureFixture) -> None:
    student = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB
    teacher = torch.nn.Linear(1024, 2048, bias=False, dtype=torch.bfloat16)  # 4 MiB
    with caplog.at_level("INFO", "opd_titan"):
        report_job(resolve(JobConfig(), "cuda", 1), 40, student, {"teacher": teacher})
    assert "20.0 MiB per rank (student 4.0 MiB, gradients 4.0 MiB, Adam 8.0 MiB" in caplog.text


def test_the_end_reports_what_was_reached_and_what_to_do(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    totals = Totals()
    totals.add({"kl/student_teacher": 0.5, "validation/accuracy": 0.25, "time/rollout(s)": 60.0})
    totals.add({"kl/student_teacher": 0.1, "validation/accuracy": 0.75, "time/rollout(s)": 65.0})
    totals.tokens = 1234
    last = {"kl/student_teacher": 0.1, "validation/accuracy": 0.75}
    with caplog.at_level("INFO", "opd_titan"):
        report_outcome(resolve(config, "cpu", 1), 40, totals, last)
    assert "KL to the teacher 0.5000 -> 0.1000, accuracy 25.0% -> 75.0%" in caplog.text
    assert "Time: rollout 0:02:05; 1,234 response tokens" in caplog.text
    assert "--training.steps 80" in caplog.text


def test_the_end_of_a_run_whose_first_validation_came_with_its_checkpoint(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Validation is enabled for the last step, and the finished job is started again."""
    before = MetricLogger(tmp_path, enable_tensorboard=False, total_steps=1)
    before.log(1, {"kl/student_teacher": 0.5})
    before.validated(1, {"validation/accuracy": 0.75})
    again = MetricLogger(tmp_path, enable_tensorboard=False, total_steps=1, start_step=1)
    again.load_state_dict(before.state_dict())
    with caplog.at_level("INFO", "opd_titan"):
        report_outcome(resolve(JobConfig(), "cpu", 1), 1, again.totals, again.last)
    assert "KL to the teacher 0.5000 -> 0.5000, accuracy 75.0%" in caplog.text
