"""What the benchmarks share: runs of the trainer, rounds in turn, JSON lines, tables, the machine.

Nothing here imports torch before it is needed, so that a script's `--help` is quick.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # `opd_titan` of this checkout

TRAIN = ("-m", "opd_titan.train")
# What scripts/environment.sh sets.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}
NO_PAUSES = {"validation.enable": "false", "checkpoint.enable": "false"}

Record = dict[str, Any]
Result = TypeVar("Result")


# ------------------------------------------------------------------ the machine


def machine() -> Record:
    """Return the command, the date, the commit, the versions and the device."""
    import torch
    import transformers

    found: Record = {
        "figure": "machine",
        "command": command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.cuda.is_available(),
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    if found["cuda"]:
        found |= {"device": torch.cuda.get_device_name(), "cuda_version": torch.version.cuda}
    return found


def command_line() -> str:
    """Return the command that started this script."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def _cpu_name() -> str:
    with suppress(OSError):
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


# ------------------------------------------------------------- JSON lines, tables


class Journal:
    """JSON lines in a file. Processes may append to it in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, record: Record) -> None:
        """Append the record. No crash can lose it after this has returned."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, start: int = 0) -> list[Record]:
        """Return the records from number `start` on, without an incomplete last one."""
        lines = self.path.read_bytes().split(b"\n")[start:-1]
        return [json.loads(line) for line in lines]


def emit(record: Record) -> None:
    """Print the record as a JSON line."""
    print(json.dumps(record, default=str), flush=True)


def show(value: Any) -> str:
    """Return a value for people, floats with four digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(v)}" for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table with a column for each key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([show(r.get(k, "")) for k in keys] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ----------------------------------------------------------------- rounds in turn


def alternate(
    cases: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 0
) -> dict[str, list[Result]]:
    """Run all cases in each round, so that a slow moment of the machine affects all of them.

    Each round starts with another case. Results of the first `warmup` rounds are dropped.

    Returns:
        For each case its result in each round.
    """
    results: dict[str, list[Result]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = cases[name]()
            if number >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float]) -> Record:
    """Return the median, the least and the greatest value."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Return the median ratio of paired rounds, with the least and the greatest in brackets."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


# ---------------------------------------------------------------- processes, runs


def words(options: Mapping[str, object]) -> list[str]:
    """Return options of the program as its command line has them."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(
    command: Sequence[object], threads: int = 0, codes: Sequence[int] = (0,), **env: str
) -> str:
    """Run a Python of its own with these arguments and return what it printed.

    Args:
        command: arguments of this interpreter.
        threads: `OMP_NUM_THREADS`; 0 leaves it as it is.
        codes: exit codes that are no failure.
        env: more variables of its environment.

    Raises:
        SystemExit: it ended with another exit code. The message has the end of its output.
    """
    whole = [sys.executable, *map(str, command)]
    inherited = {**os.environ, "PYTHONPATH": str(REPO)}
    if threads:
        inherited["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(whole, env={**inherited, **env}, cwd=REPO, capture_output=True, text=True)
    if done.returncode not in codes:
        output = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        sys.exit(f"{shlex.join(whole)} ended with exit code {done.returncode}:\n{output}")
    return done.stdout


def train(
    options: Mapping[str, object],
    threads: int = 0,
    processes: int = 1,
    program: Sequence[object] = TRAIN,
    **env: str,
) -> dict[str, dict[int, float]]:
    """Run one training job and return its scalars: by name, values by step.

    Args:
        options: of the program; `job.dump_folder` is among them.
        program: arguments of the interpreter that stand before the options.

    Raises:
        SystemExit: as for `run`.
    """
    command = [*program, *words(options)]
    if processes > 1:
        launch = ("-m", "opd_titan.cli.launch", "--nproc-per-node", processes)
        command = [*launch, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command]
    run(command, threads, **env)
    return read_scalars(Path(str(options["job.dump_folder"])))


def scalar_events(folder: Path) -> dict[str, list[Any]]:
    """Return the TensorBoard events of a job's output folder, by the scalar's name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard scalars of a job's output folder: by name, values by step."""
    return {name: {e.step: e.value for e in es} for name, es in scalar_events(folder).items()}


def medians(scalars: Mapping[str, Mapping[int, float]], *names: str) -> dict[str, float]:
    """Return the median of each scalar over the steps after the first, by its last word.

    "time/update(s)" is returned as "update".
    """
    found = {}
    for name in names:
        later = [value for step, value in scalars[name].items() if step > 1]
        found[re.sub(r".*/|\(.*", "", name)] = statistics.median(later)
    return found
