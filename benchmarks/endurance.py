"""Thousands of steps of a miniature recipe: what grows?

    python benchmarks/endurance.py --steps 2000 --processes 2 --out OUT

The debug recipe with small steps, but with all that a long run has: validation, checkpoints in the
background, exports, rollouts of every sample. The run is watched from outside (/proc, once a
second), and rank 0 counts its objects every --count steps. Slopes are least squares over the last
three quarters of the steps, through the medians of 30 equal parts, with 95 % intervals. Prints a
table; OUT/endurance.json has everything.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from harness import REPO, TUNABLES, Record, emit, machine, scalar_events, table, words

MIB = 2**20
PARTS = 30
STUDENT_T = 2.05  # at 97.5 %, with 28 degrees of freedom
COUNTS = "OPD_ENDURANCE_COUNTS"  # the file that rank 0 of the run writes its counts to
EVERY = "OPD_ENDURANCE_EVERY"  # steps between two counts
RECIPE: Record = {
    "job.config_file": "train_configs/debug.toml",
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 24,
    "lr_scheduler.decay": "constant",
    "optimizer.lr": 1e-5,
    "validation.max_prompts": 8,
    "metrics.sample_rollouts": -1,
    "checkpoint.async_mode": "async",
    "checkpoint.keep_latest_k": 2,
}
INTERVALS = {"checkpoint": 20, "validation": 50, "export": 100}  # of 2,000 steps


# ------------------------------------------------------------- inside the run


class _Mallinfo2(ctypes.Structure):
    """The state of glibc's malloc, all arenas together, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks "
        "keepcost".split()
    ]


def heap_bytes() -> int | None:
    """Return the bytes that the program has allocated, or None where malloc does not tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().uordblks


def count() -> Record:
    """Return the numbers of objects and of tensors after a collection, and the heap's bytes."""
    gc.collect()
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    kinds = [type(thing) for thing in gc.get_objects()]
    found = {"objects": len(kinds), "tensors": sum(issubclass(kind, tensor) for kind in kinds)}
    heap = heap_bytes()
    return found if heap is None else found | {"heap": heap}


def train_and_count(argv: list[str]) -> int:
    """Run the trainer and let rank 0 count at the same point of every few steps.

    That point is where it opens the step's file of rollouts; nothing in the program is changed.
    """
    from opd_titan.train import main as train

    if os.environ.get("RANK", "0") == "0":
        path, every = os.environ[COUNTS], int(os.environ[EVERY])
        step_file = re.compile(r"rollouts/step-(\d+)\.jsonl\.tmp$")

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            found = step_file.search(str(arguments[0])) if event == "open" else None
            if found and int(found[1]) % every == 0:
                line = json.dumps({"step": int(found[1]), **count()}) + "\n"
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line)

        sys.addaudithook(audit)
    return train(argv)


# ------------------------------------------------------------ outside the run


def sample(pid: int) -> Record | None:
    """Return what a process holds at this moment, memory in bytes; None if it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        status = (folder / "status").read_text()
        kib = {key: int(n) for key, n in re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE)}
        return {
            "time": time.time(),
            "resident": 1024 * kib["VmRSS"],
            "files": len(os.listdir(folder / "fd")),
            "threads": kib["Threads"],
        }
    except (OSError, KeyError):  # a process that ends has no VmRSS
        return None


def ranks(launcher: int, processes: int) -> dict[str, int]:
    """Return the processes to watch, by name."""
    if processes == 1:
        return {"rank 0": launcher}
    found = {"launcher": launcher}
    for path in Path(f"/proc/{launcher}/task").glob("*/children"):
        with suppress(OSError):
            for pid in path.read_text().split():
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [word[5:].decode() for word in environment if word.startswith(b"RANK=")]
                found |= {f"rank {r}": int(pid) for r in rank}
    return found


def watch(job: subprocess.Popen[bytes], processes: int, seconds: float) -> dict[str, list[Record]]:
    """Return samples of every process, taken until the job ends."""
    samples: dict[str, list[Record]] = {}
    while job.poll() is None:
        for name, pid in ranks(job.pid, processes).items():
            if taken := sample(pid):
                samples.setdefault(name, []).append(taken)
        with suppress(subprocess.TimeoutExpired):
            job.wait(seconds)
    return samples


def run(a: argparse.Namespace) -> dict[str, list[Record]]:
    """Run the job as `scripts/run_train.sh` does, and watch it to its end."""
    command = [sys.executable]
    if a.processes > 1:
        command += ["-m", "opd_titan.cli.launch", "--nproc-per-node", str(a.processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    options = RECIPE | {
        "job.dump_folder": a.out / "run",
        "training.steps": a.steps,
        "distill.objective": a.objective,
        "metrics.keep_rollouts": max(10, a.steps // 10),
    }
    for name, steps in INTERVALS.items():
        options[f"{name}.interval"] = max(5, min(steps, a.steps // 10))
    env = {"OMP_NUM_THREADS": "1", **TUNABLES, **os.environ, "PYTHONPATH": str(REPO)}
    env |= {COUNTS: str(a.out / "counts.jsonl"), EVERY: str(a.count)}
    with (a.out / "output").open("wb") as output:
        job = subprocess.Popen(
            [*command, __file__, "_train", *words(options)],
            env=env,
            cwd=REPO,
            stdout=output,
            stderr=output,
        )
        try:
            samples = watch(job, a.processes, a.seconds)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()
    if job.returncode != 0:
        sys.exit(f"exit code {job.returncode}:\n{(a.out / 'output').read_text()[-4000:]}")
    return samples


# -------------------------------------------------------------------- slopes


def slope(xs: Sequence[float], ys: Sequence[float]) -> Record:
    """Return the mean, the change per 1,000 steps by least squares, and half its 95 % interval.

    Through the medians of equal parts, because neighbouring samples are not independent.
    """
    x, y = (
        np.array([np.median(part) for part in np.array_split(np.asarray(values, float), PARTS)])
        for values in (xs, ys)
    )
    (per_step, _), covariance = np.polyfit(x, y, 1, cov=True)
    interval = STUDENT_T * math.sqrt(covariance[0, 0])
    return {"mean": y.mean(), "per 1,000 steps": 1000.0 * per_step, "+-": 1000.0 * interval}


def slopes(
    samples: dict[str, list[Record]], counts: list[Record], times: list[Record]
) -> list[Record]:
    """Return a row for each process and quantity, over the last three quarters of the steps."""
    start, end = times[-1]["step"] / 4, times[-1]["step"]
    series = {name: [r for r in rows if r["step"] < end] for name, rows in samples.items()}
    quantities = [(name, key) for name in series for key in ("resident", "files", "threads")]
    series["rank 0's counts"] = counts
    quantities += [("rank 0's counts", key) for key in ("objects", "tensors", "heap")]
    series["steps"] = times
    rows = []
    for name, key in [*quantities, ("steps", "seconds")]:
        late = [r for r in series[name] if r["step"] > start and key in r]
        if len(late) >= PARTS:
            scale, unit = (MIB, ", MiB") if key in ("resident", "heap") else (1, "")
            found = slope([r["step"] for r in late], [r[key] / scale for r in late])
            rows.append({"of": name, "quantity": key + unit, **found})
    return rows


def main() -> None:
    if sys.argv[1:2] == ["_train"]:
        sys.exit(train_and_count(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--objective", default="policy_gradient", help="or reverse_kl, ...")
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "endurance" / now)
    parser.add_argument("--count", type=int, default=25, help="steps between counts of objects")
    parser.add_argument("--seconds", type=float, default=1.0, help="between samples from outside")
    a = parser.parse_args()
    a.out = a.out.resolve()
    a.out.mkdir(parents=True)
    samples = run(a)
    events = scalar_events(a.out / "run")["time/step(s)"]
    times = [{"step": e.step, "seconds": e.value} for e in events]
    # The last completed step and the fraction of the next; 0 before the first.
    recorded, steps = [e.wall_time for e in events], [e.step for e in events]
    for row in (row for taken in samples.values() for row in taken):
        row["step"] = float(np.interp(row["time"], recorded, steps, left=0.0))
    counts = [json.loads(line) for line in (a.out / "counts.jsonl").open(encoding="utf-8")]
    about, rows = machine(), slopes(samples, counts, times)
    report = about | {"slopes": rows, "counts": counts, "samples": samples}
    (a.out / "endurance.json").write_text(json.dumps(report) + "\n")
    emit(about)
    print(table(rows))


if __name__ == "__main__":
    main()
