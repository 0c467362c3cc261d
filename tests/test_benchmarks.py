"""The GPU benchmark in miniature: every part still runs and says what it is there to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIZES = ("1.7B", "8B")  # tied and untied; with the optimizer's moments and without
FIGURES = {
    "update": {"update", "microbatch", "microbatch kernels"},
    "score": {"score", "score kernels"},
    "head": {"loss_head", "score_head", "same gradient", "loss_head kernels"},
    "ceiling": {"attention", "head's products", "update ceiling", "score ceiling", "wq", "w2"},
}


@pytest.fixture(scope="module")
def report(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("scale")
    command = [sys.executable, str(repo / "benchmarks" / "scale.py"), "--miniature"]
    command += ["--no-compile", "--sizes", ",".join(SIZES), "--repeats", "1", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((out / "scale.json").read_text())


def figures(report: dict[str, Any], part: str, case: str) -> dict[str, dict[str, Any]]:
    rows = (r for r in report["results"] if r["part"] == part and r["case"].startswith(case))
    return {r["figure"]: r for r in rows}


@pytest.mark.slow
def test_every_part_gives_its_figures(report: dict[str, Any]) -> None:
    for part, wanted in FIGURES.items():
        for size in SIZES:
            found = figures(report, part, size)
            assert wanted <= found.keys(), (part, size)
    for part in ("update", "score"):
        row = figures(report, part, "8B")[part]
        assert row["tflops_per_s"] > 0 and row["tokens"] == 504  # 8 sequences of 64, less one each
        assert "mfu_percent" not in row or report["cuda"]
    step = figures(report, "step", "0.6B")["step"]
    phases = sum(step[phase] for phase in ("sync", "rollout", "teacher", "update"))
    assert 0 < phases <= step["step"]
    assert step["logprob_gap_max"] < (1.0 if report["cuda"] else 1e-4)
    assert figures(report, "step", "0.6B")["decoding"]["forwards"] == 24
    decoding = figures(report, "step", "0.6B, decoding")
    for context in (16, 16 + 24):
        assert decoding[f"decoding after {context}, no graphs"]["gb_per_s"] > 0
        assert (
            decoding[f"decoding after {context}, graphs"].get("available", True) == report["cuda"]
        )


@pytest.mark.slow
def test_numerics_hold_and_the_report_is_whole(report: dict[str, Any]) -> None:
    checks = figures(report, "numerics", "0.6B")
    assert len(checks) == 6 and all(c["ok"] for c in checks.values())
    assert {"command", "date", "commit", "torch", "device", "setting"} <= report.keys()
    assert not report["skipped"]
    assert any(line.startswith("micro-batch 8B") for line in report["summary"])
