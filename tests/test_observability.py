"""What people see of a run: log files, scalars, bars, samples, traces, and the sums behind them."""

from __future__ import annotations

import fcntl
import gzip
import json
import logging
import math
import os
import pty
import random
import re
import string
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_titan.data.types import Prompt, Sample
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.observability.flops import mfu, peak_flops
from opd_titan.observability.logging import init_logging, paint, use_color
from opd_titan.observability.metrics import (
    SCALARS,
    MetricLogger,
    PhaseClock,
    console_line,
    memory_stats,
    phase_scalars,
)
from opd_titan.observability.profiling import maybe_profiler
from opd_titan.observability.progress import progress
from opd_titan.observability.rollout_writer import repetition, write_rollouts


@pytest.fixture
def logger_restored():
    """Leaves the program's logger as it was, so that other tests can catch its lines."""
    logger = logging.getLogger("opd_titan")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    for handler in set(logger.handlers) - set(before[0]):
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} as TensorBoard's own reader gives them."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
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
        "kl": "student_teacher student_reference p99",
        "policy": "entropy clip_fraction ratio_mean logprob_gap_max",
        "rollout": "response_tokens_mean response_tokens_max truncated_fraction eos_fraction "
        "repetition",
        "validation": "accuracy teacher_accuracy gap_recovered response_tokens_mean",
    }
    expected = {f"{group}/{name}" for group, row in names.items() for name in row.split()}
    expected |= {"grad_norm", "lr"}
    phases = "data rollout teacher reference update sync checkpoint validate step".split()
    expected |= {f"time/{phase}(s)" for phase in phases}
    rates = ("rollout", "teacher", "update", "step")
    expected |= {f"throughput/{phase}(tok/s/gpu)" for phase in rates}
    expected |= {f"mfu/{phase}(%)" for phase in rates[:3]}
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
    accuracy = values.pop("validation/accuracy")
    assert read.pop("validation/accuracy") == [(0, 0.25), (1, accuracy)]
    assert read == {name: [(1, value)] for name, value in values.items()}


def test_unknown_scalar_raises_on_every_rank(tmp_path):
    for rank in (0, 1):
        with pytest.raises(ValueError, match="los/total"):
            MetricLogger(tmp_path, rank=rank).log(1, {"los/total": 1.0})


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
        scalars = {"loss/total": float(step), "rollout/response_tokens_max": float(-step)}
        if step in (2, 5):
            scalars["time/checkpoint(s)"] = 10.0 * step
        logger.log(step, scalars)
        if step == 5:
            logger.log(step, {"validation/accuracy": 0.5})
    logger.close()
    assert read_scalars(tmp_path) == {
        "loss/total": [(1, 1.0), (3, 2.5), (6, 5.0), (8, 7.5)],
        "rollout/response_tokens_max": [(1, -1.0), (3, -2.0), (6, -4.0), (8, -7.0)],
        "time/checkpoint(s)": [(2, 20.0), (5, 50.0)],
        "validation/accuracy": [(5, 0.5)],
    }


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
            logger.log(step, {"loss/total": step * 1.5, "memory/max_active(GiB)": step % 4})
            if step == at:
                saved = logger.state_dict()
        return logger, saved

    run(tmp_path / "whole", range(1, 13))[0].close()
    crashed, state = run(tmp_path / "resumed", range(1, 9), at=5)  # not closed: it was killed
    run(tmp_path / "resumed", range(6, 13), start=5, state=state)[0].close()
    assert read_scalars(tmp_path / "resumed") == read_scalars(tmp_path / "whole")
    steps = [step for step, _ in read_scalars(tmp_path / "resumed")["loss/total"]]
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


def test_non_finite_values_are_written_and_flagged(tmp_path):
    logger = MetricLogger(tmp_path, log_freq=2, color=False)
    logger.log(1, {"loss/total": float("nan"), "kl/p99": float("inf")})
    assert "loss nan (!)" in logger.console_line(1, 2)
    assert "not finite (!): kl/p99" in logger.console_line(1, 2)
    for name in ("policy/logprob_gap_max", "loss/total"):
        for order in ((1.0, float("nan")), (float("nan"), 1.0)):
            window = MetricLogger(tmp_path / name / str(order[0]), log_freq=3)
            window.log(2, {name: order[0]})
            window.log(3, {name: order[1]})
            window.close()
            [(step, value)] = read_scalars(tmp_path / name / str(order[0]))[name]
            assert step == 3 and math.isnan(value)
    logger.close()
    assert math.isnan(read_scalars(tmp_path)["loss/total"][0][1])


def test_console_line():
    scalars = {
        "kl/student_teacher": 0.12345,
        "loss/total": -0.5,
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
        "step   7/100  kl 0.1235  loss -0.5000  grad 1.250  lr 1.00e-05  len 87.2  cut 12.5%  "
        "rollout 12,346 tok/s  mem 1.50 GiB  2.00 s/step  eta 1:02:05"
    )
    assert "gap recovered 81.0%" in console_line(7, 100, {"validation/gap_recovered": 0.81})
    colored = console_line(7, 100, scalars, color=True, eta_seconds=3725.4)
    assert "\x1b[" in colored and re.sub(r"\x1b\[\d*m", "", colored) == line


def test_console_line_of_the_logger_estimates_the_time_left(tmp_path):
    logger = MetricLogger(tmp_path, enable_tensorboard=False, log_freq=10, color=False)
    assert "eta" not in logger.console_line(0, 10)
    logger.log(1, {"time/step(s)": 10.0})
    logger.log(2, {"time/step(s)": 20.0})
    assert logger.console_line(2, 10).endswith("20.00 s/step  eta 0:02:00")


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


def test_phase_scalars_are_known_and_per_device():
    seconds = {"rollout": 2.0, "update": 4.0, "step": 8.0, "sync": 0.0}
    tokens = {"rollout": 800, "update": 1600, "step": 800, "teacher": 5}
    flops = {"rollout": 1e12, "update": 8e12}
    scalars = phase_scalars(seconds, tokens, flops, world_size=2, peak_flops=10e12)
    assert scalars == {
        "time/rollout(s)": 2.0,
        "time/update(s)": 4.0,
        "time/step(s)": 8.0,
        "time/sync(s)": 0.0,
        "throughput/rollout(tok/s/gpu)": 200.0,
        "throughput/update(tok/s/gpu)": 200.0,
        "throughput/step(tok/s/gpu)": 50.0,
        "mfu/rollout(%)": 2.5,
        "mfu/update(%)": 10.0,
    }
    assert set(scalars) <= set(SCALARS)
    assert not any("mfu" in name for name in phase_scalars(seconds, tokens, flops))


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


# ---- flops ----

QWEN3_06B = Qwen3Args(151936, 1024, 28, 16, 8, 128, 3072, 1e-6, 1e6, True, 40960, 0.02)


def test_forward_flops_of_qwen3_0_6b_by_hand():
    # q 1024*2048, k and v 1024*1024 each, o 2048*1024, three MLP matrices 1024*3072.
    layer = 2_097_152 + 2 * 1_048_576 + 2_097_152 + 3 * 3_145_728
    assert layer == 15_728_640
    body = 28 * layer
    head = 151_936 * 1024
    # The released model has 596,049,920 parameters, the tied head once; the rest is norms.
    assert body + head + 28 * (2 * 1024 + 2 * 128) + 1024 == 596_049_920
    one = QWEN3_06B.forward_flops([1], projected_tokens=0)
    assert one == 2 * body + 4 * 28 * 16 * 128  # no embedding, no head, one attention pair
    # 3 + 2 tokens: 6 + 3 causal pairs; 4 of the 5 positions are projected.
    two = QWEN3_06B.forward_flops([3, 2], projected_tokens=4)
    assert two == 5 * 2 * body + 9 * 4 * 28 * 16 * 128 + 4 * 2 * head


def test_forward_flops_agree_with_torchs_own_count():
    from torch.nn.functional import linear, silu
    from torch.utils.flop_counter import FlopCounterMode

    dim, heads, kv, hd, ffn, vocab, length, projected = 8, 4, 2, 6, 10, 32, 5, 3
    x = torch.randn(length, dim)
    with FlopCounterMode(display=False) as counter:
        q = linear(x, torch.randn(heads * hd, dim)).view(length, heads, hd).transpose(0, 1)
        k, v = (linear(x, torch.randn(kv * hd, dim)).view(length, kv, hd) for _ in range(2))
        k, v = (t.transpose(0, 1).repeat_interleave(heads // kv, 0) for t in (k, v))
        y = ((q @ k.mT) @ v).transpose(0, 1).reshape(length, heads * hd)
        h = linear(y, torch.randn(dim, heads * hd))
        gated = silu(linear(h, torch.randn(ffn, dim))) * linear(h, torch.randn(ffn, dim))
        linear(linear(gated, torch.randn(dim, ffn))[:projected], torch.randn(vocab, dim))
    args = Qwen3Args(vocab, dim, 1, heads, kv, hd, ffn, 1e-6, 1e4, True, 64, 0.02)
    ours = args.forward_flops([length], projected)
    # torch multiplied the whole square of pairs, above the diagonal too
    masked_pairs = length * length - length * (length + 1) // 2
    assert counter.get_total_flops() == ours + 4 * heads * hd * masked_pairs


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H20-3e", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name, peak):
    assert peak_flops(name) == peak


def test_mfu():
    assert mfu(989e12 * 3, seconds=10.0, peak=989e12, world_size=2) == pytest.approx(15.0)


# ---- rollouts ----

KEYS = (
    "step prompt_index sample_index prompt response prompt_tokens response_tokens "
    "student_logprobs teacher_logprobs reference_logprobs advantages finish_reason answer correct"
).split()


def make_sample(index: int, sample_index: int, answer: str | None = "4", **scores) -> Sample:
    prompt = Prompt(index=index, text=f"caf\u00e9 {index}?", token_ids=(1, 2), answer=answer)
    scores = {"student_logprobs": [-0.5, -1.25], **scores}
    return Sample(prompt, sample_index, [ord("4"), 10], "stop", **scores)


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def grade(response: str, answer: str) -> bool:
    return response.strip() == answer


def read_rollouts(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rollouts_have_exactly_the_designs_keys(tmp_path):
    scored = make_sample(7, 0, teacher_logprobs=[-0.25, -2.0], advantages=[0.25, -0.75])
    ungraded = make_sample(3, 1, answer=None)
    path = write_rollouts(tmp_path, 12, [scored, ungraded], decode, grade, -1)
    assert path == tmp_path / "rollouts" / "step-12.jsonl"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    rows = read_rollouts(path)
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert rows[0] == {
        "step": 12,
        "prompt_index": 7,
        "sample_index": 0,
        "prompt": "caf\u00e9 7?",
        "response": "4\n",
        "prompt_tokens": [1, 2],
        "response_tokens": [52, 10],
        "student_logprobs": [-0.5, -1.25],
        "teacher_logprobs": [-0.25, -2.0],
        "reference_logprobs": None,
        "advantages": [0.25, -0.75],
        "finish_reason": "stop",
        "answer": "4",
        "correct": True,
    }
    assert rows[1]["answer"] is None and rows[1]["correct"] is None
    assert "caf\u00e9" in path.read_text(encoding="utf-8")


def test_rollout_limit_counts_by_prompt_then_sample(tmp_path):
    samples = [make_sample(i, j) for j in (1, 0) for i in (9, 2)]

    def written(limit: int) -> list[tuple[int, int]]:
        rows = read_rollouts(write_rollouts(tmp_path, 1, samples, decode, grade, limit))
        return [(row["prompt_index"], row["sample_index"]) for row in rows]

    assert written(-1) == [(9, 0), (9, 1), (2, 0), (2, 1)]
    assert written(3) == [(9, 0), (9, 1), (2, 0)]
    assert write_rollouts(tmp_path / "none", 1, samples, decode, grade, 0) is None
    assert not (tmp_path / "none").exists()


def test_rollouts_are_valid_json_whatever_the_values(tmp_path):
    numbers = [float("nan"), float("-inf")]
    third = torch.tensor(-1 / 3).item()
    sample = make_sample(1, 0, student_logprobs=numbers, teacher_logprobs=[third, -0.0])
    strange = 'a\u2028b\x85c\u2029d\ud83de\r\n\x00"\\\U0001f600'
    path = write_rollouts(tmp_path, 1, [sample], lambda ids: strange, grade, -1)
    raw = path.read_bytes().decode("utf-8")
    assert len(raw.splitlines()) == 1

    def reject(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads(raw, parse_constant=reject)
    assert row["response"] == strange
    assert row["student_logprobs"] == [None, None]
    assert row["teacher_logprobs"] == [-0.3333333, 0.0]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_rollouts(tmp_path, 1, [make_sample(1, 0)], decode, grade)
    before = path.read_bytes()

    def broken(response: str, answer: str) -> bool:
        raise RuntimeError("grader")

    with pytest.raises(RuntimeError):
        write_rollouts(tmp_path, 1, [make_sample(2, 0)], decode, broken)
    assert path.read_bytes() == before


def test_repetition_orders_texts():
    prose = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
        "in May. In May she therefore sold 48 / 2 = 24 clips. Altogether that makes 48 + 24 = 72 "
        "clips over the two months, which is the number that was asked for."
    )
    loop = "the answer is 7. " * 40
    noise = "".join(random.Random(0).choices(string.printable, k=300))
    assert 0.0 <= repetition(noise) < repetition(prose) < 0.6 < 0.9 < repetition(loop) < 1.0
    assert repetition(prose + loop) > repetition(prose)
    assert repetition("") == repetition("7") == repetition("short") == 0.0
    assert 0.0 <= repetition("\ud83d") <= 1.0


# ---- profiler ----


def test_profiler_leaves_one_trace_per_rank_and_interval(tmp_path):
    with maybe_profiler(True, 3, tmp_path, rank=1, start_step=5) as profiler:
        for _ in range(6, 15):  # steps 6 to 14; step 15 would be next
            torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()
    folders = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert folders == ["step-12", "step-6", "step-9"]
    for folder in folders:
        [trace] = (tmp_path / "profile" / folder).iterdir()
        assert trace.name == "rank-1.json.gz"
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        assert sum(event.get("name") == "aten::mm" for event in events) == 1


def test_profiler_off_does_nothing(tmp_path):
    with maybe_profiler(False, 3, tmp_path, rank=0) as profiler:
        profiler.step()
    assert list(tmp_path.iterdir()) == []
