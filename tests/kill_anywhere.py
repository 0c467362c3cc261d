"""Kill a whole job in every phase; it must end like an undisturbed job, bit for bit.

    python tests/kill_anywhere.py --kills 50 --processes 1 --out /tmp/kills

Run a miniature recipe once undisturbed. Then start it with `scripts/run_train.sh`, kill it (SIGKILL
to the launcher and all workers), start it again with the same command, and so on; at last let it
run to its end. Compare what both leave bit for bit: TensorBoard, rollouts, exports, checkpoints. If
a run ends before it was killed often enough, another one follows.

Each kill has an aim, and the aims take turns: a moment after a phase has begun, or exactly before a
file is opened, renamed or removed (`phase_reporter` says when). Print where the kills landed. The
exit code is 1 if two runs differ, a start fails or an aim was never tried.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path[:0] = [str(HERE), str(REPO)]

import phase_reporter  # noqa: E402
from same_run import differences  # noqa: E402
from tiny_world import World, make_world  # noqa: E402

from opd_titan.checkpoint.steps import complete_steps  # noqa: E402

PATIENCE = 300.0  # seconds for one start
TAG = "OPD_TEST_JOB"

COMMON = """
    --training.steps 40 --reference.coef 0.5 --lr_scheduler.decay cosine --optimizer.lr 3e-3
    --validation.temperature 1.0
""".split()
# Together they have both ways to save, a window of several steps in TensorBoard, several updates a
# step, and exports and validations on the steps of checkpoints and on others.
VARIANTS = {
    "async": """--checkpoint.async_mode async --checkpoint.interval 2 --checkpoint.keep_latest_k 2
        --export.interval 3 --validation.interval 4""".split(),
    "sync": """--checkpoint.async_mode disabled --checkpoint.interval 3
        --checkpoint.keep_latest_k 1 --export.interval 5 --validation.interval 3
        --metrics.log_freq 4 --distill.minibatches 2""".split(),
}

# Phases, killed a moment after they have begun.
TIMED = (
    "load", "resume", "probe", "rollout", "teacher", "reference", "update", "record", "validate",
    "export", "save", "make:checkpoint",
)  # fmt: skip
# Operations, killed exactly before them.
BEFORE = (
    "write:checkpoint", "rename:checkpoint", "remove:checkpoint", "rename:hf", "remove:hf",
    "write:hf", "rename:rollouts", "write:rollouts", "begin:data", "begin:sync", "begin:end",
)  # fmt: skip
AIMS = ("start", *TIMED, *BEFORE)
# The longest times from the start, and from the beginning of a phase, to the kill.
START_SECONDS, PHASE_SECONDS = 8.0, 0.3


@dataclass(frozen=True)
class Aim:
    """Kill in the `number`-th phase of this name, after `delay` seconds, or before an operation."""

    name: str
    number: int = 1
    delay: float = 0.0

    @property
    def freezes(self) -> bool:
        return self.name in BEFORE


@dataclass
class Timeline:
    """The lines of a reporter's file, which grows."""

    path: Path
    lines: list[list[str]] = field(default_factory=list)
    _read: int = 0
    _rest: bytes = b""

    def update(self) -> list[list[str]]:
        """The new lines: pid, rank, seconds, kind, name."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._read)
            chunk = file.read()
            self._read += len(chunk)
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            new = [line.decode().split(" ", 4) for line in whole]
            self.lines += new
            return new
        return []

    def place(self) -> str:
        """Return the operation that rank 0 was frozen before, or the innermost phase it was in."""
        running: list[str] = []
        for _, rank, _, kind, name in self.lines:
            if kind == "frozen":
                return f"before {_without_numbers(name)}"
            if rank == "0" and kind == "begin":
                running.append(name)
            elif rank == "0" and kind == "end":
                running.remove(name)
        return running[-1] if running else "between phases" if self.lines else "launch"


class Job:
    """One start of the program."""

    def __init__(self, argv: list[str], processes: int, scratch: Path, freeze: str = "") -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        hook = scratch / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text("import phase_reporter\nphase_reporter.install()\n")
        flag, recipe, *rest = argv
        assert flag == "--job.config_file"
        self.tag = f"{os.getpid()}-{time.monotonic_ns()}"
        self.timeline = Timeline(scratch / f"events-{self.tag}")
        self.stderr = scratch / f"stderr-{self.tag}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": f"{hook}{os.pathsep}{HERE}",
            "OMP_NUM_THREADS": "1",
            "CONFIG_FILE": recipe,
            "NGPU": str(processes),
            TAG: self.tag,
            phase_reporter.EVENTS: str(self.timeline.path),
            phase_reporter.FOLDER: rest[rest.index("--job.dump_folder") + 1],
            phase_reporter.FREEZE: freeze,
        }
        self.started = time.monotonic()
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(REPO / "scripts" / "run_train.sh"), *rest],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def wait(self) -> int:
        """Let it end by itself."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.kill()
            self.timeline.update()

    def kill(self) -> None:
        """Send SIGKILL to all of its processes; return when none is left."""
        # The known workers first, because the moment counts.
        workers = {int(line[0]) for line in self.timeline.lines}
        if self.process.poll() is None:
            for pid in (*workers, self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while left := _tagged(self.tag):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        self.process.wait()

    def run_until(self, aim: Aim) -> bool:
        """Kill it there. Return False if it ended before."""
        due = self.started + aim.delay if aim.name == "start" else None
        seen = 0
        while self.process.poll() is None:
            now = time.monotonic()
            if now - self.started > PATIENCE:
                self.kill()
                raise TimeoutError(f"{aim}: {self.stderr.read_text()}")
            for _, rank, at, kind, name in self.timeline.update():
                if rank == "0" and _is_begin(kind, name, aim.name):
                    seen += 1
                    if seen == aim.number and not aim.freezes:
                        due = float(at) + aim.delay
                if kind == "frozen":
                    due = now
            if due is not None and now >= due:
                self.kill()
                self.timeline.update()
                return True
            time.sleep(0.0005 if due else 0.001)
        self.wait()
        return False


def _is_begin(kind: str, name: str, wanted: str) -> bool:
    if ":" in wanted:
        return kind == "file" and name.startswith(wanted)
    return kind == "begin" and name == wanted


def _tagged(tag: str) -> list[int]:
    """Return the processes of a job, in any session."""
    found, mark = [], f"{TAG}={tag}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


# ------------------------------------------------------------------- the harness


@dataclass
class Harness:
    """Runs jobs of one world and remembers where they were killed."""

    world: World
    processes: int
    scratch: Path
    random: random.Random
    aimed: Counter[str] = field(default_factory=Counter)
    landed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    options: tuple[Any, ...] = ()

    def argv(self, out: str, variant: str) -> list[str]:
        # Otherwise the speed of the ranks decides which of them samples what.
        exact = ["--training.deterministic", "True"] if self.processes > 1 else []
        return self.world.argv(out, *COMMON, *VARIANTS[variant], *exact, *self.options)

    def truth(self, variant: str) -> Path:
        """Return the folder of an undisturbed run."""
        job = Job(self.argv(f"truth-{variant}", variant), self.processes, self.scratch)
        if code := job.wait():
            raise RuntimeError(f"undisturbed, exit code {code}: {job.stderr.read_text()}")
        return self.world.folder / f"truth-{variant}"

    def disturb(self, variant: str, out: str, kills: int, plan: Sequence[Aim] = ()) -> int:
        """Kill a run up to `kills` times, then let it end. Return how often it was killed.

        Args:
            plan: the first aims; the others are chosen.
        """
        argv, folder = self.argv(out, variant), self.world.folder / out
        killed = newest = 0
        while killed < kills:
            aim = plan[killed] if killed < len(plan) else self._aim(newest)
            freeze = f"{aim.name}:{aim.number}" if aim.freezes else ""
            log = _log_size(folder)
            job = Job(argv, self.processes, self.scratch, freeze)
            ended = not job.run_until(aim)
            self._check_start(folder, newest, log)
            self.aimed[aim.name] += 1
            if ended:
                self._expect_zero(job, f"{out} after {killed} kills")
                return killed
            killed += 1
            self.landed[job.timeline.place()] += 1
            steps = complete_steps(folder / "checkpoint")
            if max(steps, default=0) < newest:
                self.problems.append(f"{out}: checkpoint step-{newest} is lost ({aim})")
            newest = max(steps, default=0)
        log = _log_size(folder)
        job = Job(argv, self.processes, self.scratch)
        job.wait()
        self._check_start(folder, newest, log)
        self._expect_zero(job, f"{out} at the end")
        return killed

    def _aim(self, newest: int) -> Aim:
        """Choose one of the least used aims.

        Args:
            newest: step of the newest checkpoint; without one nothing is resumed.
        """
        names = [name for name in AIMS if newest or name != "resume"]
        fewest = min(self.aimed[name] for name in names)
        name = self.random.choice([n for n in names if self.aimed[n] == fewest])
        # Operations on files come several at a time; a rare phase does not come twice in a life.
        most = {"rename": 3, "remove": 12, "write": 8}.get(name.partition(":")[0], 3)
        if name in ("validate", "export", "save", "make:checkpoint"):
            most = 2
        if name in ("start", "resume", "probe", "begin:end"):
            most = 1
        longest = START_SECONDS if name == "start" else PHASE_SECONDS
        return Aim(name, self.random.randint(1, most), longest * self.random.random())

    def _check_start(self, folder: Path, newest: int, log: int) -> None:
        """Check that it went on from the newest complete step, if it came that far."""
        path = folder / "logs" / "rank-0.log"
        if not path.exists():
            return
        for line in path.read_bytes()[log:].decode(errors="replace").splitlines():
            if "next step" in line and f"next step {newest + 1}" not in line:
                self.problems.append(f"newest complete step is {newest}, but: {line}")
            if "Starting at step 1" in line and newest:
                self.problems.append(f"newest complete step is {newest}, but: {line}")

    def _expect_zero(self, job: Job, what: str) -> None:
        if job.process.returncode:
            text = job.stderr.read_text()[-2000:]
            self.problems.append(f"{what}: exit code {job.process.returncode}: {text}")


def _without_numbers(operation: str) -> str:
    """Return `rename:checkpoint/step-12.tmp` as `rename:checkpoint/step-N.tmp`."""
    return re.sub(r"\d+", "N", operation)


def _log_size(folder: Path) -> int:
    path = folder / "logs" / "rank-0.log"
    return path.stat().st_size if path.exists() else 0


def kill_anywhere(
    out: Path, kills: int, processes: int, seed: int = 0, variants: tuple[str, ...] = ("async",)
) -> Harness:
    """Kill jobs `kills` times in all. The differences are in `problems`."""
    shutil.rmtree(out, ignore_errors=True)
    world = make_world(out)
    harness = Harness(world, processes, out / "scratch", random.Random(seed))
    for number, variant in enumerate(variants):
        truth = harness.truth(variant)
        quota = kills // len(variants) + (number < kills % len(variants))
        rounds = 0
        while quota > 0:
            name = f"killed-{variant}-{rounds}"
            begin = time.monotonic()
            killed = harness.disturb(variant, name, quota)
            rounds += 1
            quota -= killed
            found = differences(truth, world.folder / name)
            harness.problems += [f"{name}: {text}" for text in found]
            result = f"{len(found)} differences" if found else "bit for bit the undisturbed run"
            seconds = time.monotonic() - begin
            print(f"{name}: killed {killed} times, {seconds:.0f} s: {result}", flush=True)
    return harness


def report(harness: Harness, kills: int) -> int:
    """Print where the kills landed, and the problems. Return the exit code."""
    for name, count in sorted(harness.landed.items()):
        print(f"{count:>5}  {name}")
    for problem in harness.problems:
        print(f"PROBLEM {problem}")
    missed = [name for name in AIMS if not harness.aimed[name]]
    if missed:
        print(f"never tried: {', '.join(missed)}")
    print(f"{len(harness.problems)} problems")
    return int(bool(harness.problems) or (kills >= 50 and bool(missed)))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a folder; is emptied first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options: Any = parser.parse_args(argv)
    begin = time.monotonic()
    harness = kill_anywhere(
        options.out.resolve(),
        options.kills,
        options.processes,
        options.seed,
        tuple(options.variants),
    )
    code = report(harness, options.kills)
    print(json.dumps({"seconds": round(time.monotonic() - begin), "seed": options.seed}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
