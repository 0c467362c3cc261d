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
SHORT_STEP = ["--data", DATA, "--batch", "2", "--new-tokens", "4", "--steps", "2", "--rounds", "1"]
# The options of each script, and what the rows of its table begin with.
MINIATURES = {
    "step.py trl": (SHORT_STEP, ["0 recorded", "4 recorded"]),
    "step.py full-size": ([*SHORT_STEP, "--miniature"], ["0.6B taught by 1.7B"]),
    "objectives.py memory": (["--tokens", "64", "--vocabularies", "500"], ["500", "500", "500"]),
    "objectives.py table": (
        [
            *("--only", "reverse_kl", "--only", "no teacher: advantage -1", "--seeds", "1"),
            *("--steps", "5", "--batches", "2"),
        ],
        ["reverse_kl", "no teacher: advantage -1"],
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


def run(script: str, *options: str) -> str:
    name, *part = script.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *part, *options],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
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
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[-len(cases) :]] == cases


def test_continuous_batching_takes_fewer_steps(shared_data: Path) -> None:
    options = ["--data", str(shared_data), "--miniature", "--setting", "ragged", "--rounds", "1"]
    options += ["--requests", "6", "--concurrent", "2", "--shortest", "2", "--longest", "12"]
    heads, _, *rows = (line.split(" | ") for line in run("rollout.py", *options).splitlines()[-4:])
    ours, static = (int(row[heads.index("forwards")]) for row in rows)
    assert ours < static


# ------------------------------------------------------------------------ on a GPU


@needs_triton
def test_every_stage(tmp_path: Path) -> None:
    run("gpu.py", "--miniature", "--seconds", "850", "--out", str(tmp_path))
    found = records(tmp_path)
    ended = {r["stage"]: r["ended"] for r in found if r["figure"] == "stage"}
    assert len(ended) >= 16 and set(ended.values()) == {"well"}
    assert all(r["ok"] for r in found if "ok" in r)
    (recipe,) = (r for r in found if r["figure"] == "recipe")
    assert recipe["resumed"] and recipe["exported"]
    steps = [r for r in found if r["figure"] in ("step 1", "step 2")]
    assert all(r["sync"] + r["rollout"] + r["teacher"] + r["update"] <= r["step"] for r in steps)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


ACCIDENTS = """
import os, signal, subprocess, sys, time
sys.path.append(BENCHMARKS)
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
    script.write_text(ACCIDENTS.replace("BENCHMARKS", repr(str(BENCHMARKS))))
    return [sys.executable, str(script), "--miniature", "--out", str(tmp_path / "out")]


def test_an_accident_loses_nothing(accidents: list[str], tmp_path: Path) -> None:
    """The figures before it are kept, the later stages run, and no process is left."""
    assert subprocess.run(accidents, capture_output=True, timeout=300).returncode == 1
    found = [r for r in records(tmp_path / "out") if r.get("figure") != "stage" and "stage" in r]
    by_stage = {
        stage: [r.get("figure", r.get("error")) for r in found if r["stage"] == stage]
        for stage in ("raises", "crashes", "hangs")
    }
    before, error, after = by_stage["raises"]
    assert (before, after) == ("before", "after") and "MemoryError: on purpose" in error
    assert by_stage["crashes"] == ["before", "ended with exit code -11"]
    assert by_stage["hangs"][:2] == ["before", "child"] and "killed" in by_stage["hangs"][2]
    assert is_gone(found[-2]["pid"])


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
