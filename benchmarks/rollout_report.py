"""What `rollout.py` found, as JSON, as lines and as tables for the README."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from scale import Report


class RolloutReport(Report):
    """Keeps OUT/rollout.json complete up to the last figure."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "rollout.json"
        self.head["command"] = shlex.join(["python", "benchmarks/rollout.py", *sys.argv[1:]])


def summary(report: Report) -> list[str]:
    """Ratios beside their goals, shares of the memory's bandwidth, and what failed."""
    lines = []
    for r in (r for r in report.results if r.get("figure") == "ratio"):
        goal = f" (goal {r['goal']:g})" if "goal" in r else ""
        rounds = ", ".join(f"{x:.2f}" for x in r["rounds"])
        lines.append(f"{r['case']}: {r['of']} over {r['to']}: {r['ratio']:.2f}{goal}; {rounds}")
    for r in report.find("nano", "engine"):
        if "decode_share_of_bandwidth" in r:
            share = f"{100 * r['decode_share_of_bandwidth']:.0f} % of the bandwidth (goal 60)"
            rate = f"{r['tokens_per_s']:,.0f} tokens/s"
            lines.append(f"nano {r['case']}: {rate}; decoding at {share}")
    failed = [r for r in report.results if "error" in r]
    for r in failed:
        who = f" {r['engine']}:" if "engine" in r else ""
        lines.append(f"FAILED: {r['part']} {r['case']}:{who} {r['error'].splitlines()[-1]}")
    return lines


def tables(report: Report) -> list[str]:
    """Markdown: the machine, then a table for each kind of figure."""
    head = report.head
    versions = (
        f"Python {head['python']}, torch {head['torch']}, transformers {head['transformers']}"
    )
    for r in report.results:
        if "vllm" in r and r.get("figure") == "versions":
            versions += f", vLLM {r['vllm']}"
            break
    machine = f"{head['device']}, {head['threads']} threads, {versions}, {head['date'][:10]}"
    lines = [f"    {head['command']}", "", f"{machine}, commit {head['commit']}.", ""]
    lines += _floors(report) + _engines(report) + _curves(report) + _samplers(report)
    memory = [
        f"{r['part']} {r['case']}: {r['peak_active_gib']:.1f} GiB" for r in _all(report, "memory")
    ]
    return [*lines, *([f"Peak memory: {'; '.join(memory)}."] if memory else [])]


def _all(report: Report, figure: str) -> list[dict[str, Any]]:
    found = (r for r in report.results if r.get("figure") == figure)
    return [r for r in found if "error" not in r]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The first column is text, the others are numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines] + [""]


def _title(r: dict[str, Any]) -> str:
    return r["case"] if r["part"] == "compare" else f"{r['part']} {r['case']}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _floors(report: Report) -> list[str]:
    lines = []
    for r in _all(report, "floor"):
        bounds = []
        for phase in ("prefill", "decode"):
            by_bytes, by_flops = r[f"{phase}_bytes_s"], r[f"{phase}_flops_s"]
            bound = "bytes" if by_bytes > by_flops else "FLOPs"
            rate = f"{r[f'{phase}_tflops_per_s']:.3g} TFLOP/s"
            bounds.append(f"{phase} {max(by_bytes, by_flops):.3g} s by {bound} ({rate})")
        size = f"{r['requests']} requests, {r['concurrent']} at once"
        tokens = f"{r['prompt_tokens']:,} tokens in, {r['new_tokens']:,} out"
        read = f"{r['read_gb_per_s']:.4g} GB/s"
        lines.append(
            f"- Floor of {_title(r)} ({size}; {tokens}): {r['seconds']:.3g} s; "
            f"{', '.join(bounds)}; {read}."
        )
    return [*lines, ""] if lines else []


def _engines(report: Report) -> list[str]:
    rows = []
    for r in _all(report, "engine"):
        rounds = ", ".join(f"{x:,.0f}" for x in r["rounds"])
        phases = [f"{r[k]:.3g}" if k in r else "" for k in ("prefill_s", "decode_s")]
        shares = [_percent(r["share_of_floor"]), _percent(r.get("decode_share_of_bandwidth"))]
        rate = f"{r['tokens_per_s']:,.0f}"
        rows.append([f"{_title(r)}: {r['engine']}", rate, rounds, *phases, *shares])
    header = ["engine@concurrent", "tokens/s, median", "by round", "prefill s", "decode s"]
    return _table([*header, "share of floor", "decode, of bandwidth"], rows) if rows else []


def _curves(report: Report) -> list[str]:
    """One table a model: a row for each batch size, three columns for each way."""
    lines: list[str] = []
    found = _all(report, "step")

    def size(r: dict[str, Any]) -> str:
        return r["case"].split(", ", 1)[0]

    for name, group in groupby(sorted(found, key=size), key=size):
        cells = {(r["case"].split(", ", 1)[1], r["batch"]): r for r in group}
        ways = list(dict.fromkeys(way for way, _ in cells))
        header = ["batch", "floor ms"]
        header += [f"{w}: {c}" for w in ways for c in ("ms/step", "tokens/s", "of bandwidth")]
        rows = []
        for batch in sorted({batch for _, batch in cells}):
            row: list[str] = []
            for r in (cells.get((way, batch)) for way in ways):
                row += ["", "", ""] if r is None else _step_cells(r)
            floor = next(r["floor_ms"] for (_, b), r in cells.items() if b == batch)
            rows.append([batch, f"{floor:.3g}", *row])
        lines += [f"{name}, a decoding step:", "", *_table(header, rows)]
    return lines


def _step_cells(r: dict[str, Any]) -> list[str]:
    share = _percent(r["share_of_bandwidth"])
    return [f"{r['ms_per_step']:.3g}", f"{r['tokens_per_s']:,.0f}", share]


def _samplers(report: Report) -> list[str]:
    rows = [
        [
            f"{r['case']}: {r['rows']}",
            *(f"{r[k]:.3g}" for k in ("project_ms", "project_and_draw_ms", "floor_ms")),
        ]
        for r in _all(report, "sampler")
    ]
    header = ["head: rows", "projection ms", "projection and draw ms", "floor ms"]
    return _table(header, rows) if rows else []
