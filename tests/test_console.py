"""What people read while a job runs: how wide it is, who speaks, what it says at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from opd_titan.config import JobConfig
from opd_titan.observability.console import Totals, console_line, report_job, report_outcome
from opd_titan.observability.metrics import MetricLogger

SCALARS = {
    "kl/student_teacher": 0.0571,
    "validation/gap_recovered": 0.704,
    "rollout/response_tokens_mean": 812.3,
    "rollout/truncated_fraction": 0.031,
    "throughput/rollout(tok/s/gpu)": 13_745.0,
    "throughput/teacher(tok/s/gpu)": 131_072.0,
    "throughput/update(tok/s/gpu)": 7_707.0,
    "memory/max_reserved(GiB)": 71.25,
    "loss/policy": 0.0571,
    "grad_norm": 0.55,
    "time/step(s)": 31.5,
    "lr": 1e-6,
}
PROGRAM = f"""
import sys
from opd_titan.observability.console import console_line, terminal_columns
from opd_titan.observability.logging import init_logging, use_color
logger = init_logging(None, int(sys.argv[1]))
logger.info("%s", console_line(12, 1000, {SCALARS!r}, color=use_color(), eta_seconds=3725,
                               columns=terminal_columns()))
"""


def printed(columns: int | None, rank: int = 0, **environment: str) -> str:
    """By a program at a terminal of that width, or into a pipe."""
    kept = ("COLUMNS", "LINES", "NO_COLOR", "OPD_TITAN_LOG_ALL_RANKS")
    env = {k: v for k, v in os.environ.items() if k not in kept} | environment
    command = [sys.executable, "-c", PROGRAM, str(rank)]
    if columns is None:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    subprocess.run(command, env=env, stdout=theirs, check=True)
    os.close(theirs)
    stream = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return stream


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", text).strip()


def test_a_line_fits_the_terminal_and_keeps_what_matters() -> None:
    lines = {columns: printed(columns) for columns in (80, 100, 120, 140)}
    for columns, line in lines.items():
        assert "\x1b[32m" in line
        assert len(plain(line)) <= columns
        assert "kl 0.0571  gap recovered 70.4%" in line.replace("\x1b[0m", "").replace(
            "\x1b[32m", ""
        )
    assert "len 812.3  cut 3.1%" in plain(lines[100]) and "eta 1:02:05" in plain(lines[100])
    assert "rollout 13.7k tok/s" in plain(lines[120])
    assert len(plain(lines[140])) > len(plain(lines[80]))


def test_a_pipe_gets_everything_and_no_colors() -> None:
    line = printed(None)
    assert line == plain(line) + "\n" and "lr 1.00e-06" in line and "teacher 131k tok/s" in line


def test_no_color_is_heeded_at_a_terminal() -> None:
    line = printed(100, NO_COLOR="1")
    assert "\x1b" not in line and "kl 0.0571" in line


def test_other_ranks_speak_only_when_asked() -> None:
    assert printed(None, rank=3) == ""
    assert "] rank 3: step" in printed(None, rank=3, OPD_TITAN_LOG_ALL_RANKS="1")


def test_what_is_not_finite_is_never_left_out() -> None:
    line = console_line(1, 2, {**SCALARS, "grad_norm": float("nan"), "kl/p99": float("inf")})
    narrow = console_line(
        1, 2, {**SCALARS, "grad_norm": float("nan"), "kl/p99": float("inf")}, columns=20
    )
    for shown in (line, narrow):
        assert "grad nan (!)" in shown and "not finite (!): kl/p99" in shown


def test_the_start_counts_the_bytes_of_the_models(caplog: pytest.LogCaptureFixture) -> None:
    config = JobConfig()
    config.job.dump_folder = "out"
    student = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB
    teacher = torch.nn.Linear(1024, 2048, bias=False, dtype=torch.bfloat16)  # 4 MiB
    with caplog.at_level("INFO", "opd_titan"):
        report_job(config, 40, torch.bfloat16, student, {"teacher": teacher})
    text = caplog.text
    assert "20.0 MiB a rank (student 4.0 MiB, gradients 4.0 MiB, Adam 8.0 MiB, teacher 4.0" in text
    assert "bfloat16, the student's masters in float32" in text and "out: tb/" in text


def test_the_end_tells_what_was_reached_and_what_to_do(
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
        report_outcome(config, 40, totals, last)
    assert "KL to the teacher 0.5000 -> 0.1000, accuracy 25.0% -> 75.0%" in caplog.text
    assert "Time: rollout 0:02:05; 1,234 response tokens" in caplog.text
    assert f"tensorboard --logdir {tmp_path}/tb" in caplog.text
    assert "--training.steps 80" in caplog.text


def test_the_end_of_a_run_whose_first_validation_came_with_its_checkpoint(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Validation is turned on for the last step, and the job is started again when it is done."""
    before = MetricLogger(tmp_path, enable_tensorboard=False)
    before.log(1, {"kl/student_teacher": 0.5})
    before.validated(1, {"validation/accuracy": 0.75})
    again = MetricLogger(tmp_path, enable_tensorboard=False, start_step=1)
    again.load_state_dict(before.state_dict())
    with caplog.at_level("INFO", "opd_titan"):
        report_outcome(JobConfig(), 1, again.totals, again.last)
    assert "KL to the teacher 0.5000 -> 0.5000, accuracy 75.0%" in caplog.text
