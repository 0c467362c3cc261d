"""Scalars on their way to TensorBoard: windows, resumes, full disks, times and memory."""

from __future__ import annotations

import json
import logging
import math
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_utils import lone_world
from full_disk import largest_file
from programs import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_titan.data.types import Prompt, Sample
from opd_titan.observability.metrics import SCALARS, MetricLogger, PhaseClock, memory_scalars
from opd_titan.observability.step_scalars import kl_scalars


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return {name: [(step, value)]} from TensorBoard's reader, without the derived `charts/`."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("charts/")]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def metric_logger(folder: Path, **options: Any) -> MetricLogger:
    return MetricLogger(folder, **{"total_steps": 1000, **options})


# ------------------------------------------------------------------------ windows


def test_every_scalar_round_trips_through_tensorboard(tmp_path: Path) -> None:
    logger = metric_logger(tmp_path)
    values = {name: i + 0.5 for i, name in enumerate(SCALARS) if name != "charts/<figure>"}
    logger.log(1, values)
    logger.close()
    assert read_scalars(tmp_path) == {name: [(1, value)] for name, value in values.items()}


def test_an_unknown_scalar_raises_even_if_nothing_is_written(tmp_path: Path) -> None:
    for enable, rank in ((False, 0), (True, 1)):
        logger = metric_logger(tmp_path, enable_tensorboard=enable, rank=rank)
        for log in (logger.log, logger.log_pause):
            with pytest.raises(ValueError, match="los/policy"):
                log(1, {"los/policy": 1.0})
        logger.log(1, {"lr": 1.0})
        logger.close()
        assert logger.last == {"lr": 1.0}
    assert not (tmp_path / "tb").exists()  # only rank 0 writes, and only if that is enabled


def test_windows_have_means_and_maxima_and_the_last_step_ends_one(tmp_path: Path) -> None:
    logger = metric_logger(tmp_path, log_freq=3, total_steps=8)
    logger.log_pause(0, {"validation/accuracy": 0.25})
    for step in range(1, 9):
        scalars = {"loss/policy": float(step), "rollout/response_tokens_max": float(-step)}
        # A mean, whatever the data set is called.
        logger.log(step, {**scalars, "data/climax/share": float(step)})
        if step in (2, 5):
            logger.log_pause(step, {"time/checkpoint(s)": 10.0 * step})
    logger.close()
    means = [(1, 1.0), (3, 2.5), (6, 5.0), (8, 7.5)]
    assert read_scalars(tmp_path) == {
        "loss/policy": means,
        "data/climax/share": means,
        "rollout/response_tokens_max": [(1, -1.0), (3, -2.0), (6, -4.0), (8, -7.0)],
        "time/checkpoint(s)": [(2, 20.0), (5, 50.0)],
        "validation/accuracy": [(0, 0.25)],
    }


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0)])
def test_a_window_with_a_nan_is_nan(tmp_path: Path, values: tuple[float, ...]) -> None:
    names = ("policy/logprob_gap_max", "loss/policy")
    logger = metric_logger(tmp_path, log_freq=3)
    for step, value in enumerate(values, 2):
        logger.log(step, dict.fromkeys(names, value))
    logger.close()
    for name in names:
        [(step, value)] = read_scalars(tmp_path)[name]
        assert step == 3 and math.isnan(value)


def test_a_validation_is_known_for_its_own_weights_only(tmp_path: Path) -> None:
    logger = metric_logger(tmp_path, enable_tensorboard=False)
    logger.log(1, {"lr": 1.0})
    logger.validated(1, {"validation/accuracy": 0.5, "validation/gap_recovered": 0.1})
    logger.validated(2, {"validation/accuracy": 0.75})
    assert logger.results(2) == {"lr": 1.0, "validation/accuracy": 0.75}
    assert logger.results(3) == {"lr": 1.0}


# ------------------------------------------------------------- kills and full disks


@pytest.mark.parametrize("log_freq", [1, 3])
def test_a_killed_and_resumed_run_has_the_scalars_of_a_whole_one(
    tmp_path: Path, log_freq: int
) -> None:
    def run(folder: Path, steps: range, state: Any = None, save_at: int = 0) -> Any:
        logger = metric_logger(folder, log_freq=log_freq, start_step=steps[0] - 1)
        saved = None
        if state is not None:
            logger.load_state_dict(json.loads(json.dumps(state)))
        else:
            logger.log_pause(0, {"validation/accuracy": 0.1})
        for step in steps:
            logger.log(step, {"loss/policy": step * 1.5, "memory/max_active(GiB)": step % 4})
            if step == save_at:
                saved = logger.state_dict()
        return saved  # not closed: it was killed

    run(tmp_path / "whole", range(1, 13))
    state = run(tmp_path / "resumed", range(1, 9), save_at=5)
    run(tmp_path / "resumed", range(6, 10), state)  # killed again, before a checkpoint
    run(tmp_path / "resumed", range(6, 13), state)
    assert read_scalars(tmp_path / "resumed") == read_scalars(tmp_path / "whole")
    steps = [step for step, _ in read_scalars(tmp_path / "resumed")["loss/policy"]]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def test_a_host_with_a_slow_clock_continues_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads the files in the order of their names, which start with the time."""
    metric_logger(tmp_path).log(1, {"lr": 1.0})
    (tmp_path / "tb" / "events.out.tfevents.mine").touch()  # a file of the user
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1e9)
        metric_logger(tmp_path, start_step=1).log(2, {"lr": 2.0})
    assert read_scalars(tmp_path) == {"lr": [(1, 1.0), (2, 2.0)]}


@pytest.mark.parametrize(("room", "full_at_the_end"), [(10, False), (70, False), (70, True)])
def test_a_disk_that_is_full_for_a_while_costs_no_scalar(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: int,
    full_at_the_end: bool,
) -> None:
    monkeypatch.setattr(logging.getLogger("opd_titan"), "handlers", [caplog.handler])
    logger = metric_logger(tmp_path)
    logger.log(1, {"lr": 1.0})
    logger.log(2, {"lr": 2.0})
    (path,) = (tmp_path / "tb").iterdir()
    with largest_file(path.stat().st_size + room):
        logger.log_pause(2, {"validation/accuracy": 0.5})
        logger.log(3, {"lr": 3.0})
        if full_at_the_end:
            logger.close()
    assert "Storage: TensorBoard's events in " in caplog.text
    assert ("events are missing from " in caplog.text) == full_at_the_end
    if not full_at_the_end:
        logger.log(4, {"lr": 4.0})
        logger.close()
        assert read_scalars(tmp_path) == {
            "lr": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)],
            "validation/accuracy": [(2, 0.5)],
        }


# ------------------------------------------------------------------- times, memory


def test_the_time_left_counts_steps_and_the_pauses_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a resumed run each step takes 1 s, and a pause of 60 s follows every second step."""
    clock = 5000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    logger = metric_logger(tmp_path, enable_tensorboard=False, total_steps=30, start_step=20)
    logger.log(21, {"lr": 1.0})
    assert logger.seconds_left(21) is None
    for step in range(22, 31):
        clock += 1.0 if step % 2 == 0 else 61.0
        logger.log(step, {"lr": 1.0})
        if step == 25:
            assert logger.seconds_left(step) == pytest.approx(5 * (4 + 2 * 60) / 4)
    assert logger.seconds_left(30) == 0.0


def test_phase_clock_adds_up() -> None:
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


def test_memory_on_cpu_is_the_peak_of_this_process_alone() -> None:
    script = """
        import torch
        from opd_titan.observability.metrics import memory_scalars
        before = memory_scalars("cpu")["memory/max_active(GiB)"]
        torch.ones(2**26)  # 0.25 GiB, freed at once
        print(before, memory_scalars(torch.device("cpu"))["memory/max_active(GiB)"])
    """
    blob = torch.ones(2**28)  # 1 GiB in the parent does not count for the child
    before, after = map(float, run_python("-c", textwrap.dedent(script)).stdout.split())
    assert after - before == pytest.approx(0.25, abs=0.02)
    assert before < 1.0 < memory_scalars("cpu")["memory/max_reserved(GiB)"]
    del blob


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_cuda_is_the_peak_since_the_last_call() -> None:
    blob = torch.ones(2**28, device="cuda")
    first = memory_scalars("cuda")
    del blob
    memory_scalars("cuda")
    second = memory_scalars("cuda")
    assert first["memory/max_active(GiB)"] >= 1.0 > second["memory/max_active(GiB)"]
    assert first["memory/max_reserved(GiB)"] >= first["memory/max_active(GiB)"]


# ----------------------------------------------------------------------------- KL


def test_kl_by_position_and_its_tails() -> None:
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
    assert scalars == pytest.approx(
        {
            "kl/student_teacher": (16 + 96 + 34 * 3) / 100,
            "kl/p1": 1.0,
            "kl/p99": 3.0,
            "kl_by_position/1-16": 1.0,
            "kl_by_position/17-64": 2.0,
            "kl_by_position/65-256": 34 * 3 / 36,
        }
    )
