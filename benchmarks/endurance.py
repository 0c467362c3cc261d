"""What grows in thousands of steps?

    python benchmarks/endurance.py --steps 2000 --processes 2 --out OUT

The debug recipe with small steps, but with all that a long run has: validation, checkpoints in the
background, exports, rollouts of every sample. Every --count steps each rank writes what it holds:
memory, open files, threads, Python objects. Slopes are least squares over the last three quarters
of the steps, through the medians of 30 equal parts, with 95 % intervals. Prints a table;
OUT/endurance.json has all samples.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from harness import (
    REPO,
    TUNABLES,
    Journal,
    Record,
    emit,
    launch,
    machine,
    parser,
    read_scalars,
    run,
    table,
    words,
)

MIB = 2**20
PARTS = 30
STUDENT_T = 2.05  # at 97.5 %, with 28 degrees of freedom
OUT, EVERY = "OPD_ENDURANCE_OUT", "OPD_ENDURANCE_EVERY"  # environment variables of the run
QUANTITIES = ("resident, MiB", "heap, MiB", "files", "threads", "objects", "tensors")
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
    """Return the bytes that the program has allocated, or None without glibc's `mallinfo2`."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().uordblks


def count() -> Record:
    """Return what this process holds after a garbage collection."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    kib = {key: int(n) for key, n in re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE)}
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    kinds = [type(thing) for thing in gc.get_objects()]
    found = {
        "resident, MiB": kib["VmRSS"] / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": kib["Threads"],
        "objects": len(kinds),
        "tensors": sum(issubclass(kind, tensor) for kind in kinds),
    }
    heap = heap_bytes()
    return found if heap is None else found | {"heap, MiB": heap / MIB}


def train_and_count(argv: list[str]) -> int:
    """Run the trainer, and let this rank count before every few steps."""
    from opd_titan.train import main as train
    from opd_titan.training.trainer import Trainer

    every, train_step = int(os.environ[EVERY]), Trainer.train_step
    journal = Journal(Path(os.environ[OUT]) / f"rank-{os.environ.get('RANK', '0')}.jsonl")

    def counted(trainer: Trainer) -> int | None:
        if trainer.step % every == 0:
            journal.add({"step": trainer.step, **count()})
        return train_step(trainer)

    Trainer.train_step = counted
    return train(argv)


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


def slopes(series: dict[str, list[Record]], start: float) -> list[Record]:
    """Return a row for each rank and quantity, over the steps after `start`."""
    rows = []
    for name, records in series.items():
        late = [r for r in records if r["step"] > start]
        for key in (*QUANTITIES, "seconds"):
            found = [(r["step"], r[key]) for r in late if key in r]
            if len(found) >= PARTS:
                rows.append({"of": name, "quantity": key, **slope(*zip(*found, strict=True))})
    return rows


def main() -> None:
    if sys.argv[1:2] == ["_train"]:
        sys.exit(train_and_count(sys.argv[2:]))
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--processes", type=int, default=1)
    arguments.add_argument("--objective", default="policy_gradient", help="or reverse_kl, ...")
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    arguments.add_argument("--out", type=Path, default=REPO / "outputs" / "endurance" / now)
    arguments.add_argument("--count", type=int, default=10, help="steps between two counts")
    a = arguments.parse_args()
    a.out = a.out.resolve()
    a.out.mkdir(parents=True)
    options = RECIPE | {
        "job.dump_folder": a.out / "run",
        "training.steps": a.steps,
        "distill.objective": a.objective,
        "metrics.keep_rollouts": max(10, a.steps // 10),
    }
    for name, steps in INTERVALS.items():
        options[f"{name}.interval"] = max(5, min(steps, a.steps // 10))
    env = TUNABLES | {OUT: str(a.out), EVERY: str(a.count)}
    about = machine()
    run(launch(a.processes, __file__, "_train", *words(options)), threads=1, **env)
    seconds = read_scalars(a.out / "run")["time/step(s)"]
    series = {f"rank {r}": Journal(a.out / f"rank-{r}.jsonl").read() for r in range(a.processes)}
    series["steps"] = [{"step": step, "seconds": value} for step, value in seconds.items()]
    rows = slopes(series, a.steps / 4)
    report = about | {"slopes": rows, "samples": series}
    (a.out / "endurance.json").write_text(json.dumps(report) + "\n")
    emit(about)
    print(table(rows))


if __name__ == "__main__":
    main()
