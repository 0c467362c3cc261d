"""Is everything right and fast on a GPU? Stages that fit into calls of a few minutes.

    python benchmarks/gpu.py --seconds 600 --out OUT              # all stages, in this order
    python benchmarks/gpu.py --only decode,update --out OUT2      # some of them
    python benchmarks/gpu.py --miniature                          # tiny models, on a CPU

Random weights of true shapes; no data, no checkpoints and no network are needed. Each stage is a
process with a limit of its own; --seconds limits all of them together. Every figure and check is a
line of OUT/results.jsonl before the next begins, OUT/STAGE.log has what a stage printed, and tables
of all figures are printed at the end. Exit code 1: a check failed or a stage did not end well.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from harness import REPO, Journal, Record, command_line, machine, show, table

SHORTEST = 8.0  # seconds: a stage with less time left is not started

Work = tuple[str, dict[str, Any]]


def work(function: str, **options: Any) -> Work:
    """Name a function of another file, so that the parent process need not import torch."""
    return function, options


class Stage(NamedTuple):
    """What one process does.

    Attributes:
        limit: seconds, about twice what it takes on an H100; then it is killed.
    """

    limit: float
    works: Sequence[Work]


STAGES = {
    "env": Stage(45, [work("gpu_training.measure_device")]),
    "attention": Stage(45, [work("gpu_kernels.measure_attention")]),
    "layers": Stage(30, [work("gpu_kernels.measure_layers")]),
    "logits": Stage(30, [work("gpu_kernels.measure_logits"), work("gpu_checks.check_sampler")]),
    "engine": Stage(60, [work("gpu_checks.check_engine")]),
    "trainer": Stage(90, [work("gpu_training.train_debug_recipe")]),
    "decode": Stage(
        90, [work("rollout_limits.measure_steps", size=size) for size in ("0.6B", "1.7B", "8B")]
    ),
    "update": Stage(
        70,
        [
            work("gpu_training.measure_update", size="1.7B", compile=False),
            work("gpu_training.measure_limit", size="1.7B"),
        ],
    ),
    "step": Stage(80, [work("gpu_training.measure_step", objective="policy_gradient")]),
    "step-exact": Stage(80, [work("gpu_training.measure_step", objective="reverse_kl")]),
    "score": Stage(60, [work("gpu_training.measure_score", size="4B")]),
    "nano": Stage(60, [work("rollout_limits.measure_rollout", size="0.6B", workload="nano")]),
    "burst": Stage(90, [work("rollout_limits.measure_rollout", size="8B", workload="burst")]),
    "gap": Stage(50, [work("gpu_checks.measure_gap", trained=False)]),
    "gap-trained": Stage(50, [work("gpu_checks.measure_gap", trained=True)]),
    "numerics": Stage(
        60, [work(f"gpu_checks.check_{name}") for name in ("attention", "logprobs", "head")]
    ),
    "update-compiled": Stage(110, [work("gpu_training.measure_update", size="1.7B", compile=True)]),
}
SLOW_TO_COMPILE = ("update-compiled",)  # left out in miniature unless --only names it


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--only", help=f"some of {','.join(STAGES)}, with commas")
    parser.add_argument("--seconds", type=float, default=280.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "gpu" / now)
    parser.add_argument("--miniature", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # of a child process
    a = parser.parse_args()
    chosen = a.only.split(",") if a.only else list(STAGES)
    unknown = set(chosen).difference(STAGES)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: wanted some of {', '.join(STAGES)}")
    if a.miniature and not a.only:
        chosen = [name for name in chosen if name not in SLOW_TO_COMPILE]
    a.stages = [name for name in STAGES if name in ("env", *chosen)]
    return a


# ------------------------------------------------------------- a stage's process


def run_works(name: str, works: Iterable[Work], journal: Journal, miniature: bool) -> None:
    """Run the works in turn; one that raises does not keep the others from running."""
    import torch
    from setting import Setting

    labels: Record = {}

    def emit(record: Record) -> None:
        journal.add({"stage": name, **labels, **record})

    s = Setting(emit, miniature=True, warmup=1, repeats=1) if miniature else Setting(emit)
    if name == "env":
        emit(machine())
    for function, options in works:
        labels = options
        try:
            module, _, attribute = function.partition(".")
            torch.manual_seed(0)
            getattr(importlib.import_module(module), attribute)(s, **options)
        except Exception:
            emit({"error": traceback.format_exc(limit=-6)})
        gc.collect()
        s.reset_memory()
    sys.stdout.flush()
    os._exit(0)  # cleaning up could hang


# ------------------------------------------------------------ the parent process


def run_stage(name: str, limit: float, a: argparse.Namespace, journal: Journal) -> str:
    """Run the stage in a process and print its records as they come; return how it ended."""
    command = [sys.executable, "-X", "faulthandler", sys.argv[0], "--stage", name]
    command += ["--out", str(a.out), *(["--miniature"] if a.miniature else [])]
    seen, problems = len(journal.read()), 0
    with tempfile.TemporaryDirectory() as cache, (a.out / f"{name}.log").open("ab") as log:
        env = {
            **os.environ,
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "TMPDIR": cache,
            "TORCHINDUCTOR_CACHE_DIR": cache,  # so that no stage finds what another compiled
        }
        if a.miniature and not Path("/dev/nvidiactl").exists():
            env["TRITON_INTERPRET"] = "1"
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):  # the process, and all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if late:
        journal.add({"stage": name, "error": f"killed after {limit:.0f} s"})
    elif process.returncode:
        journal.add({"stage": name, "error": f"ended with exit code {process.returncode}"})
    for record in journal.read(seen):
        problems += "error" in record or record.get("ok") is False
        print(show(record), flush=True)
    return f"{problems} problems" if problems else "well"


def run_stages(a: argparse.Namespace, journal: Journal) -> int:
    """Run the stages; return the exit code."""
    begun, ended = time.monotonic(), {}
    try:
        for name in a.stages:
            left = a.seconds - (time.monotonic() - begun)
            start, ended[name] = time.monotonic(), "not finished"
            if left < SHORTEST:
                ended[name] = "not started: out of time"
            else:
                limit = STAGES[name].limit * (10 if a.miniature else 1)  # a CPU is slower
                ended[name] = run_stage(name, min(limit, left), a, journal)
            seconds = time.monotonic() - start
            record = {"stage": name, "figure": "stage", "ended": ended[name], "seconds": seconds}
            journal.add(record)
            print(show(record), flush=True)
            about = [r for r in journal.read() if r.get("figure") == "machine"]
            if name == "env" and not a.miniature and not any(r["cuda"] for r in about):
                print("no CUDA device: wanted one, or --miniature", file=sys.stderr)
                return 2
    finally:
        for text in summary(journal.read()):
            print("\n" + text, flush=True)
    return int(any(how != "well" for how in ended.values()))


def summary(records: list[Record]) -> Iterable[str]:
    """Yield a table for each kind of figure, and the problems."""
    kinds: dict[str, list[Record]] = {}
    for r in records:
        if "error" in r:
            yield f"FAILED: {r['stage']}: {r['error'].strip().splitlines()[-1]}"
        elif r.get("ok") is False:
            yield f"NOT OK: {show(r)}"
        else:
            kinds.setdefault(r["figure"], []).append(r)
    yield from map(table, kinds.values())


def main() -> int:
    a = parse_arguments()
    journal = Journal(a.out / "results.jsonl")
    if a.stage:
        run_works(a.stage, STAGES[a.stage].works, journal, a.miniature)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    a.out.mkdir(parents=True, exist_ok=True)
    journal.path.write_bytes(b"")
    journal.add({"figure": "command", "command": command_line()})
    return run_stages(a, journal)


if __name__ == "__main__":
    sys.exit(main())
