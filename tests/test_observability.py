"""What people see of a run: log files, scalars, bars."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
import torch
from distributed_utils import lone_world
from full_disk import largest_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_titan.data.types import Prompt, Sample
from opd_titan.observability import events
from opd_titan.observability.console import console_line
from opd_titan.observability.logging import init_logging, paint, use_color
from opd_titan.observability.metrics import (
    SCALARS,
    MetricLogger,
    PhaseClock,
    memory_stats,
)
from opd_titan.observability.progress import progress
from opd_titan.observability.step_scalars import kl_scalars


@pytest.fixture
def logger_restored():
    """Leaves the program's logger as it was, so that other tests can catch its lines."""
    logger = logging.getLogger("opd_titan")
    before = (list(logger.handlers), logger.level, logger.propagate)
    logger.handlers.clear()
    yield
    for handler in set(logger.handlers) - set(before[0]):
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} as TensorBoard's own reader gives them; what is passed, not `charts/`
    that follow from them."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("charts/")]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


# ---- logging ----


def test_rank_zero_prints_and_every_rank_has_a_file(tmp_path, capsys, logger_restored):
    for rank in (0, 1):
        logger = init_logging(tmp_path, rank)
        logger.info("%s from %d", paint("hello", "green"), rank)
        logger.warning("careful %d", rank)
        logger.debug("detail")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] hello from 0", out[0])
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] warning: careful 0", out[1])
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert len(lines) == 3
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO hello from \d", lines[0])


def test_logging_again_appends_and_does_not_double(tmp_path, capsys, logger_restored):
    for word in ("one", "two"):
        init_logging(tmp_path, 0).info(word)
    assert len(capsys.readouterr().out.splitlines()) == 2
    lines = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two"]


def test_colours_on_request_only(capsys, logger_restored, monkeypatch):
    init_logging(None, 0, color=True).warning("w")
    assert "\x1b[33mwarning: w\x1b[0m" in capsys.readouterr().out
    init_logging(None, 0, color=False).warning(paint("w", "red"))
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert use_color()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_color() and use_color(True)


BAR_SCRIPT = """
    import time
    from opd_titan.observability.logging import init_logging
    from opd_titan.observability.progress import progress

    logger = init_logging(None, 0)
    for _ in progress(range(3), "walk", "prompts"):
        pass
    with progress(500, "rollout", "tok") as bar:
        for i in range(5):
            time.sleep(0.12)
            bar.update(100)
            logger.info("line %d", i)
    logger.info("end")
"""


def test_no_control_characters_when_not_a_terminal():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BAR_SCRIPT)], capture_output=True, check=True
    )
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    assert [line.split("] ")[1] for line in lines] == [f"line {i}" for i in range(5)] + ["end"]
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", done.stdout)


def screen(stream: bytes) -> list[str]:
    """The lines that a terminal ends up showing: a carriage return overwrites."""
    shown = []
    for line in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", stream.decode()).split("\n"):
        cells: list[str] = []
        for piece in line.split("\r"):
            cells[: len(piece)] = piece
        shown.append("".join(cells).rstrip())
    return shown


def test_bar_at_a_terminal_tears_no_line_and_leaves_none():
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", textwrap.dedent(BAR_SCRIPT)]
    process = subprocess.Popen(command, stdout=side, stderr=side)
    os.close(side)
    stream = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux reports the other end's close this way
            break
        if not chunk:
            break
        stream += chunk
    os.close(main)
    assert process.wait() == 0
    assert b"rollout: " in stream and b"tok/s" in stream
    lines = [line for line in screen(stream) if line]
    assert [re.sub(r"^\[[\d:]+\] ", "", line) for line in lines] == [
        *(f"line {i}" for i in range(5)),
        "end",
    ]


def test_progress_is_silent_on_other_ranks_and_passes_items_through(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert list(progress([3, 1, 2], "x", rank=1)) == [3, 1, 2]
    assert list(progress(iter("ab"), "x", rank=1)) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# ---- metrics ----


def test_scalar_table_is_the_designs():
    names = {
        "loss": "policy total",
        "kl": "student_teacher student_reference p1 p99 reverse forward",
        "kl_by_position": "1-16 17-64 65-256 257-1024 1025-4096 4097-",
        "policy": "entropy clip_fraction ratio_mean logprob_gap_max teacher_entropy top_k_overlap "
        "top_1_agreement",
        "rollout": "response_tokens_mean response_tokens_max truncated_fraction eos_fraction "
        "idle_share preempted repetition on_policy_fraction",
    }
    expected = {f"{group}/{name}" for group, row in names.items() for name in row.split()}
    validated = "accuracy accuracy_low accuracy_high pass_at_<k> teacher_accuracy gap_recovered "
    validated += "gap_recovered_low gap_recovered_high response_tokens_mean"
    for group in ("validation", "validation/<set>"):
        expected |= {f"{group}/{name}" for name in validated.split()}
    per_set = "share kl_student_teacher response_tokens_mean truncated_fraction"
    expected |= {f"data/<set>/{name}" for name in per_set.split()}
    expected |= {"grad_norm", "skipped_updates", "lr"}
    phases = "data rollout teacher reference update sync checkpoint validate step".split()
    expected |= {f"time/{phase}(s)" for phase in phases}
    rates = ("rollout", "teacher", "update", "step")
    expected |= {f"throughput/{phase}(tok/s/gpu)" for phase in rates}
    expected |= {f"mfu/{phase}(%)" for phase in rates[:3]} | {"mbu/rollout(%)"}
    expected |= {"charts/<figure>"}
    expected |= {f"memory/{name}(GiB)" for name in ("max_active", "max_reserved")}
    assert set(SCALARS) == expected
    assert all(SCALARS.values())


def test_every_scalar_round_trips_through_tensorboard(tmp_path):
    logger = MetricLogger(tmp_path)
    values = {name: i + 0.5 for i, name in enumerate(SCALARS)}
    logger.log(0, {"validation/accuracy": 0.25})
    logger.log(1, values)
    logger.close()
    read = read_scalars(tmp_path)
    values.pop("charts/<figure>")
    accuracy = values.pop("validation/accuracy")
    assert read.pop("validation/accuracy") == [(0, 0.25), (1, accuracy)]
    assert read == {name: [(1, value)] for name, value in values.items()}


def test_unknown_scalar_raises_on_every_rank(tmp_path):
    for rank in (0, 1):
        with pytest.raises(ValueError, match="los/policy"):
            MetricLogger(tmp_path, rank=rank).log(1, {"los/policy": 1.0})


def test_only_rank_zero_writes_and_only_when_asked(tmp_path):
    for rank, enable in ((1, True), (0, False)):
        logger = MetricLogger(tmp_path, enable, rank=rank)
        logger.log(1, {"lr": 1.0})
        logger.close()
        assert logger.last == {"lr": 1.0}
    assert not (tmp_path / "tb").exists()


def test_windows_mean_max_and_last_step(tmp_path):
    logger = MetricLogger(tmp_path, log_freq=3, total_steps=8)
    for step in range(1, 9):
        scalars = {"loss/policy": float(step), "rollout/response_tokens_max": float(-step)}
        if step in (2, 5):
            scalars["time/checkpoint(s)"] = 10.0 * step
        logger.log(step, scalars)
        if step == 5:
            logger.log(step, {"validation/accuracy": 0.5})
    logger.close()
    assert read_scalars(tmp_path) == {
        "loss/policy": [(1, 1.0), (3, 2.5), (6, 5.0), (8, 7.5)],
        "rollout/response_tokens_max": [(1, -1.0), (3, -2.0), (6, -4.0), (8, -7.0)],
        "time/checkpoint(s)": [(2, 20.0), (5, 50.0)],
        "validation/accuracy": [(5, 0.5)],
    }


def test_a_data_set_may_be_called_anything(tmp_path):
    logger = MetricLogger(tmp_path, log_freq=2)
    for step, value in ((1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0)):
        logger.log(step, {"data/climax/kl_student_teacher": value})
    logger.close()
    [(_, values)] = read_scalars(tmp_path).items()
    assert values == [(1, 0.0), (2, 1.0), (4, 3.0)]


def test_validation_of_its_own_at_a_boundary_writes_nothing_twice(tmp_path):
    logger = MetricLogger(tmp_path, log_freq=2)
    logger.log(3, {"lr": 1.0})
    logger.log(4, {"validation/accuracy": 0.5})
    logger.log(4, {"lr": 2.0})
    logger.close()
    assert read_scalars(tmp_path) == {"lr": [(4, 1.5)], "validation/accuracy": [(4, 0.5)]}


@pytest.mark.parametrize("log_freq", [1, 3])
def test_resume_after_a_crash_gives_the_scalars_of_a_run_that_never_stopped(tmp_path, log_freq):
    def run(folder, steps, start=0, state=None, at=None):
        logger = MetricLogger(folder, log_freq=log_freq, start_step=start)
        saved = None
        if state is not None:
            logger.load_state_dict(json.loads(json.dumps(state)))
        if start == 0:
            logger.log(0, {"validation/accuracy": 0.1})
        for step in steps:
            logger.log(step, {"loss/policy": step * 1.5, "memory/max_active(GiB)": step % 4})
            if step == at:
                saved = logger.state_dict()
        return logger, saved

    run(tmp_path / "whole", range(1, 13))[0].close()
    crashed, state = run(tmp_path / "resumed", range(1, 9), at=5)  # not closed: it was killed
    run(tmp_path / "resumed", range(6, 13), start=5, state=state)[0].close()
    assert read_scalars(tmp_path / "resumed") == read_scalars(tmp_path / "whole")
    steps = [step for step, _ in read_scalars(tmp_path / "resumed")["loss/policy"]]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    crashed.close()


def test_starting_over_in_the_same_folder_forgets_the_first_start(tmp_path):
    for offset in (0.0, 1.0):
        logger = MetricLogger(tmp_path)
        logger.log(0, {"validation/accuracy": offset})
        logger.log(1, {"lr": offset})
        logger.close()
    assert read_scalars(tmp_path) == {"validation/accuracy": [(0, 1.0)], "lr": [(1, 1.0)]}


def test_events_survive_a_kill(tmp_path):
    script = f"""
        import os
        from pathlib import Path
        from opd_titan.observability.metrics import MetricLogger
        logger = MetricLogger(Path({str(tmp_path)!r}))
        for step in (1, 2, 3):
            logger.log(step, {{"lr": float(step)}})
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE)
    assert done.returncode == 9, done.stderr.decode()
    assert read_scalars(tmp_path) == {"lr": [(1, 1.0), (2, 2.0), (3, 3.0)]}


@pytest.mark.parametrize("closed_while_full", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_no_scalar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, closed_while_full: bool
) -> None:
    monkeypatch.setattr(events, "_SECONDS_TO_RETRY", 0.0)
    monkeypatch.setattr(events.logger, "handlers", [caplog.handler])
    logger = MetricLogger(tmp_path)
    logger.log(1, {"lr": 1.0})
    logger.log(2, {"lr": 2.0})
    with largest_file(64):
        logger.log(2, {"validation/accuracy": 0.5})
        logger.log(3, {"lr": 3.0})
        if closed_while_full:
            logger.close()
    assert "Storage: TensorBoard's events in " in caplog.text
    assert ("lacks steps 2 to 3 for good" in caplog.text) == closed_while_full
    if closed_while_full:
        return
    logger.log(4, {"lr": 4.0})
    logger.close()
    assert read_scalars(tmp_path) == {
        "lr": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)],
        "validation/accuracy": [(2, 0.5)],
    }


def test_non_finite_values_are_written_and_flagged(tmp_path):
    logger = MetricLogger(tmp_path, log_freq=2, color=False)
    logger.log(1, {"loss/policy": float("nan"), "kl/p99": float("inf")})
    assert "loss nan (!)" in logger.console_line(1, 2)
    assert "not finite (!): kl/p99" in logger.console_line(1, 2)
    for name in ("policy/logprob_gap_max", "loss/policy"):
        for order in ((1.0, float("nan")), (float("nan"), 1.0)):
            window = MetricLogger(tmp_path / name / str(order[0]), log_freq=3)
            window.log(2, {name: order[0]})
            window.log(3, {name: order[1]})
            window.close()
            [(step, value)] = read_scalars(tmp_path / name / str(order[0]))[name]
            assert step == 3 and math.isnan(value)
    logger.close()
    assert math.isnan(read_scalars(tmp_path)["loss/policy"][0][1])


def test_console_line():
    scalars = {
        "kl/student_teacher": 0.12345,
        "loss/policy": -0.5,
        "grad_norm": 1.25,
        "lr": 1e-5,
        "rollout/response_tokens_mean": 87.25,
        "rollout/truncated_fraction": 0.125,
        "throughput/rollout(tok/s/gpu)": 12345.6,
        "memory/max_reserved(GiB)": 1.5,
        "time/step(s)": 2.0,
        "policy/entropy": 1.0,
    }
    line = console_line(7, 100, scalars, eta_seconds=3725.4)
    assert line == (
        "step   7/100  kl 0.1235  len 87.2  cut 12.5%  eta 1:02:05  rollout 12.3k tok/s  "
        "mem 1.50 GiB  loss -0.5000  grad 1.250  2.00 s/step  lr 1.00e-05"
    )
    assert "gap recovered 81.0%" in console_line(7, 100, {"validation/gap_recovered": 0.81})
    colored = console_line(7, 100, scalars, color=True, eta_seconds=3725.4)
    assert "\x1b[" in colored and re.sub(r"\x1b\[\d*m", "", colored) == line


def test_console_line_of_the_logger_estimates_the_time_left(tmp_path):
    logger = MetricLogger(tmp_path, enable_tensorboard=False, log_freq=10, color=False)
    assert "eta" not in logger.console_line(0, 10)
    logger.log(1, {"time/step(s)": 10.0})
    logger.log(2, {"time/step(s)": 20.0})
    assert logger.console_line(2, 10).endswith("eta 0:02:00  20.00 s/step")


def test_the_time_left_counts_the_pauses_between_steps(tmp_path):
    """Each step takes 1 s, and every second one is followed by 60 s of validation."""
    logger = MetricLogger(tmp_path, enable_tensorboard=False)
    logger.log(0, {"time/validate(s)": 900.0})  # comes once
    left = []
    for step in range(1, 11):
        logger.log(step, {"time/step(s)": 1.0})
        left.append(logger.seconds_left(step, 10))
        if step % 2 == 0:
            logger.log(step, {"time/validate(s)": 50.0, "time/checkpoint(s)": 10.0})
    assert left[2] == pytest.approx(7 + 4 * 60) and left[8] == pytest.approx(1 + 60)
    assert left[9] == 0.0


def test_a_step_does_not_show_what_another_one_had(tmp_path):
    """With rollout.on_policy_fraction below 1 a step may have none of the student's samples."""
    logger = MetricLogger(tmp_path, enable_tensorboard=False, color=False)
    logger.log(1, {"loss/policy": 1.0, "kl/student_teacher": 0.5, "kl/p99": math.inf})
    logger.log(1, {"validation/gap_recovered": 0.25})
    logger.log(2, {"loss/policy": 2.0})
    assert logger.console_line(2, 9) == "step 2/9  gap recovered 25.0%  loss 2.0000"


def test_phase_clock_adds_up():
    clock = PhaseClock("cpu")
    with clock.phase("step"):
        for _ in range(2):
            with clock.phase("rollout"):
                time.sleep(0.02)
        with pytest.raises(KeyError), clock.phase("update"):
            time.sleep(0.03)
            raise KeyError
    seconds = clock.pop()
    assert set(seconds) == {"step", "rollout", "update"}
    assert seconds["rollout"] >= 0.04 and seconds["update"] >= 0.03
    assert 0 <= seconds["step"] - seconds["rollout"] - seconds["update"] < 0.02
    assert clock.pop() == {}
    with pytest.raises(ValueError, match="rolout"), clock.phase("rolout"):
        pass


def test_memory_on_cpu_is_the_peak_of_this_process_alone():
    script = """
        import torch
        from opd_titan.observability.metrics import memory_stats
        before = memory_stats("cpu")["memory/max_active(GiB)"]
        torch.ones(2**26)  # 0.25 GiB, gone at once
        print(before, memory_stats(torch.device("cpu"))["memory/max_active(GiB)"])
    """
    blob = torch.ones(2**28)  # 1 GiB in the parent is none of the child's
    command = [sys.executable, "-c", textwrap.dedent(script)]
    before, after = map(float, subprocess.check_output(command).split())
    assert after - before == pytest.approx(0.25, abs=0.02)
    assert before < 1.0 < memory_stats("cpu")["memory/max_reserved(GiB)"]
    assert set(memory_stats("cpu")) <= set(SCALARS)
    del blob


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_cuda_is_the_peak_since_the_last_call():
    blob = torch.ones(2**28, device="cuda")
    first = memory_stats("cuda")
    del blob
    memory_stats("cuda")
    second = memory_stats("cuda")
    assert first["memory/max_active(GiB)"] >= 1.0 > second["memory/max_active(GiB)"]
    assert first["memory/max_reserved(GiB)"] >= first["memory/max_active(GiB)"]


def test_distance_to_the_teacher_by_position_and_its_tails() -> None:
    """1 nat in the first 16 tokens, 2 up to the 64th, 3 after that; -9 and 9 once."""
    samples = []
    for i in range(3):
        ratio_R = torch.tensor([1.0] * 16 + [2.0] * 48 + [3.0] * 36)
        ratio_R[70], ratio_R[71] = -9.0, 9.0
        teacher_R = torch.full((100,), -4.0)
        samples.append(
            Sample(Prompt(i, "", (1,)), 0, [1] * 100, "length", teacher_R + ratio_R, teacher_R)
        )
    samples.append(Sample(Prompt(9, "", (1,)), 0, [1, 1], "length", None, torch.zeros(2)))
    scalars = kl_scalars(samples, lone_world())
    assert scalars.pop("kl/student_teacher") == pytest.approx((16 + 96 + 34 * 3) / 100)
    assert scalars == pytest.approx(
        {
            "kl/p1": 1.0,
            "kl/p99": 3.0,
            "kl_by_position/1-16": 1.0,
            "kl_by_position/17-64": 2.0,
            "kl_by_position/65-256": 34 * 3 / 36,
        }
    )


def test_what_is_said_before_there_is_a_folder_gets_into_the_file(tmp_path, logger_restored):
    init_logging(None, 1).warning("early")
    init_logging(tmp_path, 1).info("late")
    lines = (tmp_path / "logs" / "rank-1.log").read_text().splitlines()
    assert [line.rsplit(" ", 2)[-2:] for line in lines] == [["WARNING", "early"], ["INFO", "late"]]
