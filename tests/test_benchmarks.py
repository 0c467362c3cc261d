"""Every benchmark in miniature on a CPU: it runs, and gives a figure for each case."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.long
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the kernels are Triton's: pip install triton",
)

DATA = "DATA"  # stands for the folder of real data
# Of each script: its options, and what the rows of its table begin with.
MINIATURES = {
    "compare_trl.py": (
        [
            *("--data", DATA, "--batch", "2", "--new-tokens", "4", "--steps", "2"),
            *("--rounds", "1", "--threads", "1", "--record", "0", "1"),
        ],
        ["ours, 0 recorded", "ours, 1 recorded"],
    ),
    "recording.py": (
        ["--data", DATA, "--record", "0", "1", "--cycles", "2", "--new-tokens", "2"],
        ["0", "1"],
    ),
    "objectives.py cost": (
        [
            *("--data", DATA, "--only", "policy_gradient", "--only", "reverse_kl"),
            *("--steps", "2", "--rounds", "1", "--new-tokens", "2", "--threads", "1"),
        ],
        ["policy_gradient", "reverse_kl"],
    ),
    "objectives.py memory": (
        ["--tokens", "64", "--vocabularies", "500", "--threads", "1"],
        ["500", "500", "500"],
    ),
    "objectives.py table": (
        [
            *("--only", "reverse_kl", "--only", "no teacher: advantage -1", "--seeds", "1"),
            *("--steps", "5", "--batches", "2", "--threads", "1"),
        ],
        ["reverse_kl", "no teacher: advantage -1"],
    ),
    "packing.py": (
        ["--dims", "128", "--prompts", "1", "--rounds", "1", "--threads", "1"],
        ["128", "128"],
    ),
    "activation_checkpoint.py": (
        ["--tokens", "64", "--sequence", "32", "--layers", "1", "--rounds", "1", "--eager"],
        ["eager, none", "eager, selective", "eager, full"],
    ),
    "rollout.py": (
        [
            *("--data", DATA, "--miniature", "--concurrent", "4", "--new-tokens", "5"),
            *("--rounds", "1", "--engines", "ours,generate"),
        ],
        ["ours", "generate"],
    ),
    "stopping.py": (["--stops", "1"], ["1"]),
}


def run(script: str, *options: str, **env: str) -> str:
    name, *part = script.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *part, *options],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), **env},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("script", MINIATURES)
def test_script(script: str, request: pytest.FixtureRequest) -> None:
    options, cases = MINIATURES[script]
    if DATA in options:
        folder = str(request.getfixturevalue("shared_data"))
        options = [folder if word == DATA else word for word in options]
    lines = run(script, *options).splitlines()
    assert json.loads(lines[0])["figure"] == "machine"
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[-len(cases) :]] == cases


def test_full_size(shared_data: Path) -> None:
    text = run("full_size.py", "--data", str(shared_data), "--miniature", "--new-tokens", "4")
    _, first, second = map(json.loads, text.splitlines())
    assert (first["number"], second["number"]) == (1, 2)
    assert all(0 < row["rollout"] + row["update"] < row["step"] for row in (first, second))


def test_continuous_batching_takes_fewer_steps(shared_data: Path) -> None:
    options = ["--data", str(shared_data), "--miniature", "--setting", "ragged", "--rounds", "1"]
    options += ["--requests", "6", "--concurrent", "2", "--shortest", "2", "--longest", "12"]
    heads, _, *rows = (line.split(" | ") for line in run("rollout.py", *options).splitlines()[-5:])
    ours, waves, batches = (int(row[heads.index("forwards")]) for row in rows)
    assert ours < waves == batches


# ------------------------------------------------------------------------ on a GPU


@needs_triton
def test_every_stage(tmp_path: Path) -> None:
    run("gpu.py", "--miniature", "--seconds", "390", "--out", str(tmp_path))
    found = records(tmp_path)
    ended = {r["stage"]: r["ended"] for r in found if r["figure"] == "stage"}
    assert len(ended) >= 16 and set(ended.values()) == {"well"}
    assert all(r["ok"] for r in found if "ok" in r)
    (recipe,) = (r for r in found if r["figure"] == "recipe")
    assert recipe["resumed"] and recipe["exported"]
    steps = [r for r in found if r["figure"] == "step"]
    assert all(r["sync"] + r["rollout"] + r["teacher"] + r["update"] <= r["step"] for r in steps)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


ACCIDENTS = """
import os, signal, subprocess, sys, time
sys.path.append(sys.argv.pop())
import gpu

def emits(s, name):
    s.emit({"figure": name})

def raises(s):
    raise MemoryError("on purpose")

def crashes(s):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(s):
    s.emit({"figure": "child", "pid": subprocess.Popen(["sleep", "1000"]).pid})
    time.sleep(1000)

before, after = (gpu.work("accidents.emits", name=name) for name in ("before", "after"))
if __name__ == "__main__":
    gpu.STAGES.clear()
    for name, limit in (("raises", 40), ("crashes", 40), ("hangs", 9)):
        works = before, gpu.work(f"accidents.{name}"), after
        gpu.STAGES[name] = gpu.Stage(limit, works)
    sys.exit(gpu.main())
"""


@pytest.fixture
def accidents(tmp_path: Path) -> list[str]:
    script = tmp_path / "accidents.py"
    script.write_text(ACCIDENTS.replace("sys.argv.pop()", repr(str(BENCHMARKS))))
    return [sys.executable, str(script), "--miniature", "--out", str(tmp_path / "out")]


def test_an_accident_loses_nothing(accidents: list[str], tmp_path: Path) -> None:
    """Neither what was found before it, nor the stages after it; and it leaves no process."""
    done = subprocess.run(accidents, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    found = [r for r in records(tmp_path / "out") if r.get("figure") != "stage" and "stage" in r]
    by_stage = {
        stage: [r.get("figure", r.get("error")) for r in found if r["stage"] == stage]
        for stage in ("raises", "crashes", "hangs")
    }
    before, error, after = by_stage["raises"]
    assert (before, after) == ("before", "after") and "MemoryError: on purpose" in error
    assert by_stage["crashes"] == ["before", "ended with exit code -11"]
    assert "Segmentation fault" in (tmp_path / "out" / "crashes.log").read_text()
    assert by_stage["hangs"] == ["before", "child", "killed after 90 s"]
    assert is_gone(found[-2]["pid"])
    assert "FAILED: crashes: ended with exit code -11" in done.stdout


def test_a_call_that_is_ended_sums_up_and_leaves_no_process(
    accidents: list[str], tmp_path: Path
) -> None:
    process = subprocess.Popen([*accidents, "--only", "hangs"], stdout=subprocess.PIPE, text=True)
    deadline, children = time.monotonic() + 200, []
    while not children and time.monotonic() < deadline:
        time.sleep(0.2)
        if (tmp_path / "out" / "results.jsonl").exists():
            children = [r for r in records(tmp_path / "out") if r["figure"] == "child"]
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "| hangs |" in output
    assert is_gone(children[0]["pid"])


def test_without_time_nothing_is_started(accidents: list[str], tmp_path: Path) -> None:
    command = [*accidents, "--seconds", "1"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 1
    found = [r for r in records(tmp_path / "out") if r["figure"] == "stage"]
    assert {r["ended"] for r in found} == {"not started: out of time"}


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
