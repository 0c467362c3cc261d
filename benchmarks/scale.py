"""Scale on one device: update, scoring, a whole step, the ceiling, and the numerics of it all.

    python benchmarks/scale.py --out OUT                # everything: minutes on one H200
    python benchmarks/scale.py --only update,score --sizes 1.7B --no-compile
    python benchmarks/scale.py --miniature              # the same code in seconds, on a CPU

Random weights of true shapes; no data is needed. Each case runs in a process of its own, so that
one that fails, hangs or leaves a broken device takes nothing with it. Every figure is printed and
written to OUT/scale.json as it comes.
"""

from __future__ import annotations

import os

# The parent must leave CUDA alone: its children are forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import argparse  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import platform  # noqa: E402
import shlex  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import replace  # noqa: E402
from datetime import datetime, timezone  # noqa: E402
from functools import partial  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]  # a script's children may start anew

import scale_phases as phases  # noqa: E402
import torch  # noqa: E402
from qwen3_shapes import NAMES  # noqa: E402
from scale_ceiling import measure_ceiling, measure_head  # noqa: E402
from scale_numerics import measure_numerics  # noqa: E402
from scale_setting import GIB, Setting  # noqa: E402

PARTS = ("numerics", "step", "update", "score", "head", "ceiling")
# PowerOPD (arXiv 2606.17199), 0.6B taught by 4B, 32 sequences x 1024 new tokens, sampled token.
PUBLISHED = {"step_s": 9.03, "peak_gib": 60.72}
GOALS = {"update": 45.0, "score": 55.0}
Run = Callable[[Setting], None]


class Case(NamedTuple):
    part: str
    name: str
    run: Run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "scale")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--sizes", default="1.7B,4B,8B", help=f"of {','.join(NAMES)}")
    both = argparse.BooleanOptionalAction
    parser.add_argument("--miniature", action=both, help="default: where there is no CUDA device")
    parser.add_argument("--compile", action=both, help="default: not in miniature")
    parser.add_argument("--head-chunk-mib", type=int, default=0, help="0: the head's own")
    parser.add_argument("--warmup", type=int, help="default: 2, in miniature 1")
    parser.add_argument("--repeats", type=int, help="default: 5, in miniature 2")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds; then no new case")
    parser.add_argument("--case-limit", type=float, default=180.0, help="seconds of one case")
    a = parser.parse_args()
    for names, known in ((a.only, PARTS), (a.sizes, NAMES)):
        unknown = set(names.split(",")).difference(known)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return a


def plan(only: list[str], sizes: list[str], compile: bool) -> Iterator[Case]:
    """What to run: first what nobody has ever seen, then by how much it says."""
    ways = {"compiled": True, "eager": False} if compile else {"eager": False}
    cases = [Case("numerics", "0.6B", measure_numerics)]
    for way, on in ways.items():
        run = partial(phases.measure_step, compile=on)
        cases.append(Case("step", f"0.6B taught by 4B, {way}", run))
    cases.append(Case("step", "0.6B, decoding", phases.measure_decoding))
    two = (("update", phases.measure_update), ("score", phases.measure_score))
    for part, measure in two:
        for way, on in ways.items():
            for size in sizes:
                cases.append(Case(part, f"{size}, {way}", partial(measure, size=size, compile=on)))
    for part, measure in (("head", measure_head), ("ceiling", measure_ceiling)):
        cases += [Case(part, size, partial(measure, size=size)) for size in sizes]
    # Eager runs of what is also measured compiled come last.
    cases.sort(key=lambda c: compile and c.part != "numerics" and c.name.endswith("eager"))
    yield from (c for c in cases if c.part in only)


# ------------------------------------------------------- one case, one process


def describe(s: Setting) -> None:
    """Versions and the device."""
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.cuda.is_available(),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if found["cuda"]:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = torch.cuda.get_device_name(0)
        found["memory_gib"] = properties.total_memory / GIB
        found["cuda_version"] = torch.version.cuda
    s.emit(found)


def _work(connection: Connection, run: Run, s: Setting) -> None:
    try:
        s = replace(s, emit=connection.send)
        if run is not describe:
            s.start()
        run(s)
    except Exception:
        connection.send({"error": traceback.format_exc(limit=-6)})
    connection.send(None)
    sys.stdout.flush()
    os._exit(0)  # nothing is left to tidy up that could not hang


def run_case(start: str, run: Run, s: Setting, limit: float) -> Iterator[dict[str, Any]]:
    """What the case says, as it says it, and how it ended if that was not well."""
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, run, s))
    process.start()
    theirs.close()
    deadline = time.monotonic() + limit
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            record = ours.recv()
            if record is None:
                break
            yield record
        else:
            yield {"error": f"stopped after {limit:.0f} s"}
            process.kill()
    except EOFError:
        process.join()
        yield {"error": f"the process ended with exit code {process.exitcode}"}
    process.join(20.0)
    process.kill()


# ------------------------------------------------------------------- results


class Report:
    """Prints every figure as it comes, and keeps OUT/scale.json complete up to it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.begun = folder / "scale.json", time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []
        self.head: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _commit(),
        }

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def add(self, case: Case, record: dict[str, Any]) -> None:
        self.results.append({"part": case.part, "case": case.name, **record})
        figures = {k: v for k, v in record.items() if k not in ("figure", "top", "error")}
        values = "  ".join(f"{k} {_show(v)}" for k, v in figures.items())
        title = f"{case.part} {case.name}: {record.get('figure', '')}"
        print(f"[{self.seconds:5.0f} s] {title}  {values}", flush=True)
        for line in record.get("top", [])[:6]:
            print(f"            {line}", flush=True)
        if "error" in record:
            print(f"            ERROR {record['error']}", flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        text = json.dumps({**self.head, **more, "results": self.results}, indent=1)
        new = self.path.with_suffix(".new")
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.path)

    def find(self, part: str, figure: str) -> list[dict[str, Any]]:
        return [r for r in self.results if r["part"] == part and r.get("figure") == figure]


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_show(v)}" for k, v in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def summary(report: Report) -> list[str]:
    """The goals, and where the time went that the ceiling did not need."""
    lines = []
    for part in ("update", "score"):
        for r in report.find(part, part):
            mfu = r.get("mfu_percent")
            reached = f"MFU {mfu:.1f} % (goal {GOALS[part]:.0f})" if mfu else "no peak known"
            rate = f"{r['tokens_per_s']:,.0f} tokens/s, {r['tflops_per_s']:.4g} TFLOP/s, {reached}"
            memory = f"{r['peak_active_gib']:.1f} GiB"
            lines.append(f"{part} {r['case']}, {r['budget']} tokens: {rate}, {memory}")
    for figure in ("update ceiling", "score ceiling"):
        for r in report.find("ceiling", figure):
            mfu = f"MFU {r['mfu_percent']:.1f} %" if "mfu_percent" in r else "no peak known"
            lines.append(f"{figure} {r['case']}: {r['tflops_per_s']:.4g} TFLOP/s, {mfu}")
    ceilings = {r["case"]: r for r in report.find("ceiling", "update ceiling")}
    measured = [r for r in report.find("update", "microbatch")]
    largest = max((r["budget"] for r in measured), default=0)
    for r in (r for r in measured if r["budget"] == largest):
        best = ceilings.get(r["case"].split(",")[0])
        if best:
            took, needs = r["median_s"], best["seconds"]
            parts = [f"{p} {best[f'{p}_s']:.4g}" for p in ("layers", "attention", "head")]
            rest = f"{took - needs:.4g} s ({100 * (took - needs) / took:.0f} %) are the rest"
            lines.append(
                f"micro-batch {r['case']}: {took:.4g} s; products and attention alone "
                f"{needs:.4g} s ({', '.join(parts)}); {rest}"
            )
    for r in report.find("step", "step"):
        phases = ", ".join(f"{p} {r[p]:.4g} s" for p in ("rollout", "teacher", "update"))
        published = f"PowerOPD reports {PUBLISHED['step_s']} s, {PUBLISHED['peak_gib']} GiB"
        compared = "" if report.head["miniature"] else f"; {published}"
        memory = f"{r['peak_active_gib']:.1f} GiB"
        lines.append(f"step {r['case']}: {r['step']:.4g} s ({phases}), {memory}{compared}")
    failed = [r for r in report.results if "error" in r or r.get("ok") is False]
    lines += [f"FAILED: {r['part']} {r['case']}: {r.get('figure', r.get('error'))}" for r in failed]
    return lines


def main() -> int:
    a = parse_arguments()
    report = Report(a.out)
    start = "fork"
    probe = Setting(miniature=True, compile=False, warmup=0, repeats=1)
    about = list(run_case(start, describe, probe, 120.0))[-1]
    if not about.get("cuda") and Path("/dev/nvidiactl").exists():  # a fork that lost the device
        start = "spawn"
        about = list(run_case(start, describe, probe, 120.0))[-1]
    report.head |= about
    print(json.dumps(report.head), flush=True)
    miniature = not about.get("cuda") if a.miniature is None else a.miniature
    compile = not miniature if a.compile is None else a.compile
    make, often = (Setting.small, (1, 2)) if miniature else (partial(Setting, False), (2, 5))
    warmup = often[0] if a.warmup is None else a.warmup
    repeats = often[1] if a.repeats is None else a.repeats
    s = make(compile=compile, warmup=warmup, repeats=repeats, head_chunk_mib=a.head_chunk_mib)
    report.head |= {"miniature": miniature, "setting": {**vars(s), "emit": None}}
    measure(a, report, start, s)
    return int(any("error" in r for r in report.results))


def measure(a: argparse.Namespace, report: Report, start: str, s: Setting) -> None:
    skipped = []
    for case in plan(a.only.split(","), a.sizes.split(","), s.compile):
        left = a.time_limit - report.seconds
        if left <= 0:
            skipped.append(f"{case.part} {case.name}")
            continue
        for record in run_case(start, case.run, s, min(a.case_limit, left + 15.0)):
            report.add(case, record)
    lines = summary(report)
    lines += [f"NOT STARTED, out of time: {name}" for name in skipped]
    print("\n".join(["", *lines]), flush=True)
    report.write(summary=lines, skipped=skipped, seconds=report.seconds)


if __name__ == "__main__":
    sys.exit(main())
