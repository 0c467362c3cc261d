"""The GPU benchmark in miniature: every stage still runs, and no accident loses what was found."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

STAGES = (
    *("attention", "layers", "logits", "engine", "trainer", "decode", "products", "update", "step"),
    *("step-exact", "score", "nano", "burst", "gap", "numerics", "decode-eager", "sampler"),
    *("update-8B", "head-8B", "ceiling-8B"),
)
SIZES = ("0.6B", "1.7B", "8B")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the kernels are Triton's: pip install triton",
)


def command(repo: Path, out: Path, *options: str) -> list[str]:
    script = str(repo / "benchmarks" / "gpu.py")
    return [sys.executable, script, "--miniature", "--out", str(out), *options]


def run(repo: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(repo)}
    whole = command(repo, out, *options)
    return subprocess.run(whole, env=env, capture_output=True, text=True, timeout=900)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def ends(out: Path) -> dict[str, str]:
    stages = json.loads((out / "stages.json").read_text())["stages"]
    return {stage["stage"]: stage["ended"] for stage in stages}


# ---------------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def found(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("gpu")
    done = run(repo, out, "--only", ",".join(STAGES), "--seconds", "800")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ends(out) == dict.fromkeys(("env", *STAGES), "well")
    assert "| decoding step, 8B, batch 4, context 24 |" in (out / "summary.md").read_text()
    return records(out)


def figures(found: list[dict[str, Any]], stage: str, figure: str) -> list[dict[str, Any]]:
    return [r for r in found if r.get("stage") == stage and r["figure"] == figure]


@needs_triton
@pytest.mark.slow
def test_every_stage_gives_its_figures(found: list[dict[str, Any]]) -> None:
    assert all(r["ok"] for r in found if "ok" in r)
    names = {(r["stage"], r["figure"]) for r in found if "stage" in r}
    wanted = {
        "env": ["ceilings"],
        "attention": ["operator", "independence", "split lengths", "grouped heads"],
        "layers": ["operator"],
        "logits": ["operator", "truncation"],
        "engine": ["engine", "engine, weights changed in place", "engine, capture fails"],
        "trainer": ["recipe"],
        "products": ["projection", "passes over logits, ms"],
        "update": ["update", "microbatch", "microbatch kernels", "update ceiling"],
        "update-8B": ["update", "microbatch", "microbatch kernels"],
        "score": ["score", "score kernels"],
        "nano": ["floor", "engine", "memory"],
        "burst": ["floor", "engine", "memory"],
        "gap": ["gap"],
        "head-8B": ["loss_head", "score_head", "same gradient", "loss_head kernels"],
        "ceiling-8B": ["attention", "head's products", "update ceiling", "score ceiling"],
    }
    assert {(stage, f) for stage, figures in wanted.items() for f in figures} <= names
    assert len(figures(found, "numerics", "rollout against update")) == 1
    update, score = figures(found, "update-8B", "update")[-1], figures(found, "score", "score")[-1]
    assert update["optimizer"] == "SGD" and update["tokens"] == 504  # 8 sequences of 64, less 1
    assert score["tokens"] == 504 and score["tflops_per_s"] > 0
    assert figures(found, "trainer", "recipe")[0]["resumed"]


@pytest.mark.slow
def test_figures_agree_with_each_other(found: list[dict[str, Any]]) -> None:
    for stage, objective in (("step", "policy_gradient"), ("step-exact", "reverse_kl")):
        (step,) = figures(found, stage, "step")
        phases = sum(step[phase] for phase in ("sync", "rollout", "teacher", "update"))
        assert 0 < phases <= step["step"] and step["objective"] == objective
        assert figures(found, stage, "the step's decoding")[0]["forwards"] == 24
    steps = figures(found, "decode", "decoding step")
    assert {(r["size"], r["batch"]) for r in steps} == {(n, b) for n in SIZES for b in (1, 2, 4)}
    for r in steps:
        assert r["tokens_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms_per_step"])
        assert r["share_of_bandwidth"] == pytest.approx(r["floor_ms"] / r["ms_per_step"])
        assert 0 < r["share_of_bandwidth"] < 1.2 and r["steps"] == 13  # of 16, less the first 2
    for r in figures(found, "sampler", "sampler"):
        assert 0 < r["project_ms"] and 0 < r["project_and_draw_ms"]
    cuda = found[0]["cuda"]
    for r in figures(found, "gap", "gap"):
        assert 0 < r["tokens"] and r["gap_mean"] <= r["gap_max"] < (1.0 if cuda else 1e-4)


@needs_triton
def test_operators_beside_their_twins(repo: Path, tmp_path: Path) -> None:
    done = run(repo, tmp_path, "--only", "attention,layers,logits")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = [r for r in records(tmp_path) if r["figure"] == "operator"]
    names = {"silu_mul", "add_norm", "norm_rope", "paged_decode", "paged_prefill", "block_stats"}
    names |= {"logit_stats", "softmax_grad", "kl_stats", "kl_grad"}
    names |= {"silu_mul_backward", "norm_backward", "norm_rope_backward"}
    assert {r["operator"] for r in found} == names and all(r["ok"] for r in found)
    assert "| norm_rope | float16 |" in (tmp_path / "summary.md").read_text()


# ------------------------------------------------------------------- accidents

ACCIDENTS = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1] + "/benchmarks"]
from apart import Journal, Task, run_apart
from gpu_setting import Setting

def raises(s):
    s.emit({"figure": "before"})
    raise MemoryError("on purpose")

def goes_on(s):
    s.emit({"figure": "after"})

def crashes(s):
    s.emit({"figure": "before"})
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(s):
    s.emit({"figure": "child", "pid": subprocess.Popen(["sleep", "1000"]).pid})
    time.sleep(1000)

out = Path(sys.argv[2])
journal = Journal(out / "results.jsonl")
journal.begin()
for name, works in {"one": (raises, goes_on), "two": (crashes, goes_on), "three": (hangs,)}.items():
    task = Task({"stage": name}, works, out / "log")
    limit = 5.0 if name == "three" else 100.0
    yielded = list(run_apart("fork", task, Setting.small(), limit, journal))
    assert yielded == [r for r in journal.read() if r["stage"] == name]
"""


def test_an_accident_loses_nothing(repo: Path, tmp_path: Path) -> None:
    """Neither what was found before it, nor the stages after it; and it leaves no process."""
    env = {**os.environ, "PYTHONPATH": str(repo)}
    driver = [sys.executable, "-c", textwrap.dedent(ACCIDENTS), str(repo), str(tmp_path)]
    subprocess.run(driver, env=env, check=True, timeout=200)
    one, two, three = (
        [r for r in records(tmp_path) if r["stage"] == name] for name in ("one", "two", "three")
    )
    assert [r.get("figure") for r in one] == ["before", None, "after"]
    assert "MemoryError: on purpose" in one[1]["error"]
    assert [r.get("figure") for r in two] == ["before", None]
    assert two[1]["error"] == f"ended with exit code {-signal.SIGSEGV}"
    assert "Segmentation fault" in (tmp_path / "log").read_text()
    assert three[1]["error"] == "stopped after 5 s"
    assert is_gone(three[0]["pid"])


def is_gone(pid: int) -> bool:
    """Whether a process ends soon. One that nobody has waited for yet is still listed, as Z."""
    for _ in range(300):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_call_that_is_ended_sums_up(repo: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(repo)}
    process = subprocess.Popen(command(repo, tmp_path, "--only", "engine,products"), env=env)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        path = tmp_path / "results.jsonl"
        if path.exists() and any(r.get("stage") == "engine" for r in records(tmp_path)):
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert "Ceilings of this device" in (tmp_path / "summary.md").read_text()
    assert ends(tmp_path) == {"env": "well", "engine": "not finished"}


def test_without_time_nothing_is_started(repo: Path, tmp_path: Path) -> None:
    assert run(repo, tmp_path, "--only", "layers", "--seconds", "1").returncode == 1
    assert ends(tmp_path) == dict.fromkeys(("env", "layers"), "not started: out of time")
    assert "layers: not started: out of time" in (tmp_path / "summary.md").read_text()


# --------------------------------------------------------------------- summary


def test_goals_and_what_failed(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    from gpu_summary import summary

    step = {"figure": "decoding step", "size": "8B", "context": 1000, "ms_per_step": 10.0}
    whole = {"figure": "step", "compile": False, "peak_active_gib": 50.0}
    whole |= dict.fromkeys(("rollout", "teacher", "update"), 1.0)
    found: list[dict[str, Any]] = [
        {**step, "batch": 64, "floor_ms": 6.1, "share_of_bandwidth": 0.61},
        {**step, "batch": 256, "floor_ms": 5.9, "share_of_bandwidth": 0.59},
        {**whole, "objective": "policy_gradient", "step": 4.0},
        {**whole, "objective": "reverse_kl", "step": 6.0},
        {"stage": "engine", "figure": "engine", "ok": False},
        {"stage": "gap", "error": "Traceback\nRuntimeError: CUDA error\n"},
    ]
    lines = summary(found, goals=True)
    met = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines if line.startswith("|")}
    assert met["| decoding step, 8B, batch 64, context 1000"] == "reached |"
    assert met["| decoding step, 8B, batch 256, context 1000"] == "missed |"
    assert met["| step, 0.6B taught by 4B, policy_gradient"] == "reached |"
    assert met["| exact over sampled step"] == "missed |"  # 1.5x
    assert lines[-2:] == ["NOT OK: engine engine", "FAILED: gap: RuntimeError: CUDA error"]
