"""How long the debug recipe takes to leave after SIGTERM, sent at random moments of its steps.

    python benchmarks/stopping.py --stops 20 --processes 1

Each start goes on where the last one was stopped. Prints seconds from the signal to the exit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def stop_once(out: Path, processes: int, delay: float) -> float:
    """Seconds to exit code 75."""
    log = out / "logs" / "rank-0.log"
    seen = log.stat().st_size if log.exists() else 0
    command = [str(REPO / "scripts" / "run_train.sh"), "--job.dump_folder", str(out)]
    command += ["--training.steps", "100000", "--validation.interval", "10"]
    command += ["--checkpoint.interval", "0"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NGPU": str(processes)}
    run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not log.exists() or " step " not in log.read_text()[seen:]:
            if run.poll() is not None:
                sys.exit(f"the run ended with code {run.returncode} before its first step")
            time.sleep(0.05)
        time.sleep(delay)
        start = time.perf_counter()
        os.killpg(run.pid, signal.SIGTERM)
        code = run.wait(300)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    if code != 75:
        sys.exit(f"exit code {code}, not 75")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    pick = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        delays = [pick.uniform(0.0, 12.0) for _ in range(a.stops)]
        seconds = [stop_once(Path(folder), a.processes, delay) for delay in delays]
    print(
        f"{a.processes} processes, {a.stops} stops: median {statistics.median(seconds):.2f} s, "
        f"longest {max(seconds):.2f} s to exit code 75, with a checkpoint"
    )


if __name__ == "__main__":
    main()
