"""Thousands of steps of a miniature recipe: what grows?

    python benchmarks/endurance.py --steps 2000 --processes 2 --out OUT

The debug recipe with small steps, but with everything a long run has: validation, checkpoints in
the background, exports, rollouts of every sample. The program is started as users start it and
watched from outside (/proc, once a second), besides a count of its objects from within now and
then. Slopes are least squares over the last three quarters of the steps, through the medians of 30
equal parts, with 95 % intervals; one table, and OUT/endurance.json with everything in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path[:0] = [str(HERE), str(REPO)]

import endurance_probe  # noqa: E402

MIB = 2**20
PARTS = 30
RECIPE = """
    --rollout.prompts_per_step 2 --rollout.group_size 2 --rollout.max_new_tokens 24
    --lr_scheduler.decay constant --optimizer.lr 1e-5 --validation.max_prompts 8
    --metrics.sample_rollouts -1 --checkpoint.async_mode async --checkpoint.keep_latest_k 2
""".split()
INTERVALS = {"checkpoint": 20, "validation": 50, "export": 100}  # of 2,000 steps
UNITS = {
    "rss": "MiB",
    "uss": "MiB",
    "pss": "MiB",
    "fds": "",
    "threads": "",
    "children": "",
    "step": "s",
    "objects": "",
    "tensors": "",
    "malloc_used": "MiB",
    "malloc_free": "MiB",
    "malloc_mapped": "MiB",
}


# ------------------------------------------------------------------ watching


def children(pid: int) -> list[int]:
    """Processes that `pid` started, oldest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in task.read_text().split()]
    return sorted(found)


def sample(pid: int) -> dict[str, float] | None:
    """What a process holds at this moment, memory in bytes; None if it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        rollup = (folder / "smaps_rollup").read_text()
        kib = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", rollup, re.MULTILINE)}
        status = (folder / "status").read_text()
        return {
            "time": time.time(),
            "rss": 1024 * kib["Rss"],
            "pss": 1024 * kib["Pss"],
            "uss": 1024 * (kib["Private_Clean"] + kib["Private_Dirty"]),
            "huge": 1024 * kib["AnonHugePages"],
            "fds": len(os.listdir(folder / "fd")),
            "threads": int(re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)[1]),
            "children": len(children(pid)),
        }
    except (OSError, KeyError):  # a process that ends has an empty smaps_rollup
        return None


def workers(launcher: int, processes: int) -> dict[str, int]:
    """Processes to watch, by name."""
    if processes == 1:
        return {"rank 0": launcher}
    named = {"launcher": launcher}
    for pid in children(launcher):
        with suppress(OSError):
            if b"opd_titan.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [word[5:] for word in environment if word.startswith(b"RANK=")]
                named[f"rank {rank[0].decode()}"] = pid
    return named


def watch(
    job: subprocess.Popen[bytes], processes: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Samples of every process until the job ends."""
    samples: dict[str, list[dict[str, float]]] = {}
    while job.poll() is None:
        for name, pid in workers(job.pid, processes).items():
            if taken := sample(pid):
                samples.setdefault(name, []).append(taken)
        with suppress(subprocess.TimeoutExpired):
            job.wait(seconds)
    return samples


# ------------------------------------------------------------------- running


def command(args: argparse.Namespace) -> list[str]:
    """The program's own command line, as scripts/run_train.sh makes it."""
    words = [sys.executable, "-m"]
    if args.processes > 1:
        words += ["opd_titan.cli.launch", "--nproc-per-node", str(args.processes)]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    words += ["opd_titan.train", "--job.config_file", "train_configs/debug.toml"]
    words += ["--job.dump_folder", str(args.out / "run"), "--training.steps", str(args.steps)]
    words += [*RECIPE, "--distill.objective", args.objective]
    for table, steps in INTERVALS.items():
        words += [f"--{table}.interval", str(max(5, min(steps, args.steps // 10)))]
    return [*words, "--metrics.keep_rollouts", str(max(10, args.steps // 10)), *args.options]


def environment(args: argparse.Namespace) -> dict[str, str]:
    hook = args.out / "hook"
    hook.mkdir()
    text = "import endurance_probe\nendurance_probe.install()\n"
    (hook / "sitecustomize.py").write_text(text)
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(hook), str(HERE), str(REPO)]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # What scripts/environment.sh sets.
        "GLIBC_TUNABLES": os.environ.get(
            "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
        ),
    }
    if args.probe > 0:
        found[endurance_probe.FILE] = str(args.out / "probe.jsonl")
        found[endurance_probe.EVERY] = str(args.probe)
    return found


def run(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Start the program and watch it to its end."""
    with (args.out / "output").open("wb") as output:
        job = subprocess.Popen(
            command(args), env=environment(args), cwd=REPO, stdout=output, stderr=output
        )
        try:
            samples = watch(job, args.processes, args.seconds)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()
    if job.returncode != 0:
        sys.exit(f"exit code {job.returncode}:\n{(args.out / 'output').read_text()[-4000:]}")
    return samples


def step_times(folder: Path) -> list[tuple[int, float, float]]:
    """(step, when it was recorded, seconds it took), from TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    return [(e.step, e.wall_time, e.value) for e in events.Scalars("time/step(s)")]


# -------------------------------------------------------------------- slopes


def parts(xs: Sequence[float], ys: Sequence[float]) -> Iterator[tuple[float, float]]:
    """The medians of equal parts: samples of a second apart are no independent ones."""
    low, high = min(xs), max(xs)
    width = (high - low) / min(PARTS, len(xs)) or 1.0
    boxes: dict[int, list[int]] = {}
    for i, x in enumerate(xs):
        boxes.setdefault(min(int((x - low) / width), PARTS - 1), []).append(i)
    for box in boxes.values():
        yield statistics.mean(xs[i] for i in box), statistics.median(ys[i] for i in box)


def slope(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """Change per 1,000 steps by least squares, and half its 95 % interval (nan without one)."""
    points = list(parts(xs, ys))
    n, mean_x = len(points), statistics.mean(x for x, _ in points)
    mean_y = statistics.mean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    found = {"first": points[0][1], "last": points[-1][1], "mean": mean_y, "parts": n}
    if n < 3 or spread == 0.0:
        return {**found, "slope": math.nan, "interval": math.nan}
    per_step = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    left = sum((y - mean_y - per_step * (x - mean_x)) ** 2 for x, y in points)
    free = n - 2
    t = 1.96 + 2.37 / free + 2.8 / free**2  # Student's t at 97.5 %
    interval = t * math.sqrt(left / free / spread)
    return {**found, "slope": 1000.0 * per_step, "interval": 1000.0 * interval}


def analyse(
    samples: dict[str, list[dict[str, float]]],
    steps: list[tuple[int, float, float]],
    counts: list[dict[str, Any]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Slopes by process and quantity, over the last three quarters of the steps."""
    start = steps[-1][0] / 4
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, taken in samples.items():
        rows = [s for s in taken if start < s["step"] < steps[-1][0]]
        xs = [s["step"] for s in rows]
        for key in ("rss", "uss", "pss", "fds", "threads", "children"):
            scale = MIB if UNITS[key] else 1
            found.setdefault(name, {})[key] = slope(xs, [s[key] / scale for s in rows])
    late = [(step, seconds) for step, _, seconds in steps if step > start]
    found["rank 0"]["step"] = slope(*zip(*late, strict=True))
    counts = [c for c in counts if c["step"] > start]
    if len(counts) > 2:
        xs = [c["step"] for c in counts]
        for key in ("objects", "tensors", "malloc_used", "malloc_free", "malloc_mapped"):
            if key in counts[0]:
                scale = MIB if UNITS[key] else 1
                found["rank 0"][key] = slope(xs, [c[key] / scale for c in counts])
    return found


def step_at(moment: float, steps: list[tuple[int, float, float]]) -> float:
    """The step that was done last, with the part of the next; 0 before the first was."""
    i = bisect_right(steps, moment, key=lambda row: row[1])
    if i in (0, len(steps)):
        return float(steps[i - 1][0]) if i else 0.0
    (step, begun, _), (_, ended, _) = steps[i - 1], steps[i]
    return step + (moment - begun) / max(ended - begun, 1e-9)


def grown_kinds(counts: list[dict[str, Any]]) -> dict[str, int]:
    """Types of which there are more at the end than after a quarter of the counts."""
    if len(counts) < 3:
        return {}
    early, late = counts[len(counts) // 4]["kinds"], counts[-1]["kinds"]
    grown = {kind: n - early.get(kind, n) for kind, n in late.items()}
    ranked = sorted(((n, kind) for kind, n in grown.items() if n > 0), reverse=True)
    return {kind: n for n, kind in ranked[:15]}


def written(folder: Path, steps: int) -> dict[str, float]:
    """Bytes on the disk: of logs and events per step, of what has bounds as it is."""

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())

    return {
        "tensorboard_bytes_per_step": size("tb") / steps,
        "log_bytes_per_step": size("logs") / steps,
        "rollout_files": len(list((folder / "rollouts").iterdir())),
        "rollout_bytes": size("rollouts"),
        "checkpoints": len(list((folder / "checkpoint").glob("step-*"))),
        "export_bytes": size("hf"),
    }


def table(slopes: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    yield f"{'process':9} {'quantity':14} {'first':>10} {'last':>10} {'per 1,000 steps':>24}"
    for name, rows in slopes.items():
        for key, row in rows.items():
            unit, factor = UNITS[key], 1.0
            if key == "step":  # seconds say little; a share of them does
                unit, factor = "%", 100.0 / row["mean"]
            change = f"{factor * row['slope']:+.3f} +- {factor * row['interval']:.3f} {unit:3}"
            yield f"{name:9} {key:14} {row['first']:10.3f} {row['last']:10.3f} {change:>24}"


def setting(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "command": " ".join(["python", "benchmarks/endurance.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "libc": " ".join(platform.libc_ver()),
        "tunables": os.environ.get(
            "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
        ),
        "cores": os.cpu_count(),
        "steps": args.steps,
        "processes": args.processes,
        "objective": args.objective,
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--objective", default="policy_gradient", help="or reverse_kl, ...")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--probe", type=int, default=25, help="steps between counts; 0 none")
    parser.add_argument("--seconds", type=float, default=1.0, help="between samples from outside")
    parser.add_argument("options", nargs="*", help="after --: more options of the program")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run, and everything that was found."""
    args.out = args.out.resolve()
    args.out.mkdir(parents=True)
    began = time.monotonic()
    samples = run(args)
    steps = step_times(args.out / "run")
    for taken in samples.values():
        for row in taken:
            row["step"] = step_at(row["time"], steps)
    probed = args.out / "probe.jsonl"
    counts = [json.loads(line) for line in probed.open()] if probed.exists() else []
    report = {
        **setting(args),
        "seconds": time.monotonic() - began,
        "slopes": analyse(samples, steps, counts),
        "grown_kinds": grown_kinds(counts),
        "written": written(args.out / "run", args.steps),
        "counts": [{k: v for k, v in c.items() if k != "kinds"} for c in counts],
        "samples": samples,
    }
    (args.out / "endurance.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    report = measure(arguments())
    print(*table(report["slopes"]), sep="\n")
    print(json.dumps(report["grown_kinds"]), json.dumps(report["written"]), sep="\n")


if __name__ == "__main__":
    main()
