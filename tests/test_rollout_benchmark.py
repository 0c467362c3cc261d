"""The rollout benchmark cut down: every part still runs, and its figures agree with each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RAGGED = ["--setting", "ragged", "--requests", "6", "--concurrent", "2"]


def run(repo: Path, out: Path, *options: str, fails: bool = False) -> dict[str, Any]:
    command = [sys.executable, str(repo / "benchmarks" / "rollout.py"), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [*command, *options], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == fails, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((out / "rollout.json").read_text())


def rows(report: dict[str, Any], figure: str, part: str = "") -> list[dict[str, Any]]:
    found = (r for r in report["results"] if r["figure"] == figure)
    return [r for r in found if not part or r["part"] == part]


def check_engine(r: dict[str, Any], floor: dict[str, Any]) -> None:
    assert r["tokens"] == floor["new_tokens"]
    assert 0 < r["share_of_floor"] < 1.2
    assert r["share_of_floor"] == pytest.approx(floor["seconds"] / r["seconds"])
    assert min(r["rounds"]) <= r["tokens_per_s"] <= max(r["rounds"])
    if "decode_s" in r:
        assert 0 < r["prefill_s"] + r["decode_s"] <= 1.01 * r["seconds"]
        assert 0 < r["decode_share_of_bandwidth"] <= 1.2 and r["decode_share_of_floor"] < 1.2


def test_engines_side_by_side(repo: Path, tmp_path: Path) -> None:
    options = ["--concurrent", "4", "--new-tokens", "5", "--vocab", "2048", "--rounds", "2"]
    options += ["--engines", "ours,vllm,generate", "--vllm-python", "/nowhere/python"]
    report = run(repo, tmp_path, *options, fails=True)
    failed = [r for r in report["results"] if "error" in r]
    assert [r["engine"] for r in failed] == ["vllm"]  # and the others go on
    report["results"].remove(failed[0])
    floors = {r["concurrent"]: r for r in rows(report, "floor")}
    engines = {r["engine"]: r for r in rows(report, "engine")}
    assert engines.keys() == {"ours@4", "ours@2", "generate@4", "generate@2"}
    for r in engines.values():
        assert r["tokens"] == 5 * r["concurrent"] == 5 * r["requests"]
        check_engine(r, floors[r["concurrent"]])
    assert engines["ours@4"]["forwards"] == 5
    assert floors[4]["prompt_tokens"] == 42 + 35 + 64 + 57
    ratios = {(r["of"], r["to"]): r for r in rows(report, "ratio")}
    assert len(ratios) == 3 and ("ours@4", "generate@2") in ratios
    for (mine, other), r in ratios.items():
        pairs = zip(engines[mine]["rounds"], engines[other]["rounds"], strict=True)
        assert r["rounds"] == pytest.approx([a / b for a, b in pairs])
    table = (tmp_path / "rollout.md").read_text()
    assert "| small: ours@4 |" in table and "FAILED: compare small: vllm" in table
    assert "ours@4 over generate@2" in table


@pytest.mark.slow
def test_continuous_batching_beside_waves_and_static_batches(repo: Path, tmp_path: Path) -> None:
    options = ["--shortest", "2", "--longest", "12", "--vocab", "2048", "--rounds", "1"]
    report = run(repo, tmp_path, *RAGGED, *options)
    (floor,) = rows(report, "floor")
    ours, waves, batches = rows(report, "engine")
    assert [r["engine"] for r in (ours, waves, batches)] == ["ours@2", "waves@2", "batches@2"]
    for r in (ours, waves, batches):
        check_engine(r, floor)
    assert ours["forwards"] < waves["forwards"] == batches["forwards"]
    for ratio, other in zip(rows(report, "ratio"), (waves, batches), strict=True):
        assert ratio["ratio"] == pytest.approx(ours["tokens_per_s"] / other["tokens_per_s"])


def test_a_gpus_workload_in_miniature(repo: Path, tmp_path: Path) -> None:
    options = ["--setting", "nano", "--miniature", "--engines", "ours", "--sizes", "8B"]
    report = run(repo, tmp_path, *options)
    assert {"torch", "device", "commit"} <= report.keys()
    floors = {r["case"]: r for r in rows(report, "floor", "nano")}
    (r,) = rows(report, "engine", "nano")
    assert r["case"] == "8B, ours" and r["requests"] == r["concurrent"] == 8
    check_engine(r, floors["8B, ours"])


def test_nano_workload_is_nano_vllms(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    from rollout_engines import nano_workload

    work = nano_workload(256, 100, 1024, 151936)
    assert sum(work.new_tokens) == 133966  # as its README says
    assert len(work.prompts) == 256 and max(map(len, work.prompts)) <= 1024
