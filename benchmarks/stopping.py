"""How long does the debug recipe take to end after SIGTERM, at random moments of its steps?

    python benchmarks/stopping.py --stops 20 --processes 1

Each start resumes where the last one was stopped. Seconds are from the signal to the end of the
process, which saves a checkpoint in between.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import REPO, emit, machine, parser, spread, table, words

OPTIONS = {"training.steps": 100000, "validation.interval": 10, "checkpoint.interval": 0}


def stop_once(out: Path, processes: int, delay: float) -> float:
    """Start the job, send SIGTERM `delay` seconds after its first step; return the seconds."""
    log = out / "logs" / "rank-0.log"
    seen = log.stat().st_size if log.exists() else 0
    command = [REPO / "scripts" / "run_train.sh", *words(OPTIONS), "--job.dump_folder", out]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NGPU": str(processes)}
    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not log.exists() or " step " not in log.read_text()[seen:]:
            if job.poll() is not None:
                sys.exit(f"the run ended with exit code {job.returncode} before its first step")
            time.sleep(0.05)
        time.sleep(delay)
        start = time.perf_counter()
        os.killpg(job.pid, signal.SIGTERM)
        if job.wait(300) != 75:
            sys.exit(f"the run ended with exit code {job.returncode}; wanted 75")
        return time.perf_counter() - start
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--stops", type=int, default=20)
    arguments.add_argument("--processes", type=int, default=1)
    arguments.add_argument("--seed", type=int, default=0)
    a = arguments.parse_args()
    emit(machine())
    dice = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        delays = [dice.uniform(0.0, 12.0) for _ in range(a.stops)]
        seconds = [stop_once(Path(folder), a.processes, delay) for delay in delays]
    print(table([{"processes": a.processes, "stops": a.stops, **spread(seconds)}]))


if __name__ == "__main__":
    main()
