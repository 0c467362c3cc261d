"""Kill a whole job in every phase; it must end like an undisturbed job, bit for bit.

    python tests/kill_anywhere.py --kills 50 --processes 1 --out /tmp/kills

A miniature recipe runs once undisturbed. Then it is started through `scripts/run_train.sh`, killed
(SIGKILL, the launcher and all workers), started again with the same command, and so on, and at last
left to run to its end. What both leave behind is compared bit for bit: TensorBoard, rollouts,
exports, checkpoints. A run that ends before it was killed often enough is followed by another one.

Kills are aimed, so that each phase is hit: after a random part of a phase's usual time, or exactly
before a file is opened, renamed or removed (`phase_reporter` tells when). Printed is where they
landed. The exit code is 1 where two runs differ, a start fails or a phase was never hit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
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
# Between them: both ways to save, a window of several steps in TensorBoard, exports and validations
# that do and do not fall on the steps of checkpoints, several updates a step.
VARIANTS = {
    "async": """--checkpoint.async_mode async --checkpoint.interval 2 --checkpoint.keep_latest_k 2
        --export.interval 3 --validation.interval 4""".split(),
    "sync": """--checkpoint.async_mode disabled --checkpoint.interval 3
        --checkpoint.keep_latest_k 1 --export.interval 5 --validation.interval 3
        --metrics.log_freq 4 --distill.minibatches 2""".split(),
}

STARTING = ("launch", "import", "prepare", "load", "resume", "probe")
TIMED = ("load", "resume", "probe", "rollout", "teacher", "reference", "update", "record")
TIMED += ("validate", "export", "save", "make:checkpoint")
BEFORE = (
    "write:checkpoint", "rename:checkpoint", "remove:checkpoint", "rename:hf", "remove:hf",
    "write:hf", "rename:rollouts", "write:rollouts", "begin:data", "begin:sync", "begin:end",
)  # fmt: skip
PHASES = ("start", "data", "sync", *TIMED[3:-1], "background", "publish", "delete")


@dataclass(frozen=True)
class Aim:
    """When to kill: in the `number`-th phase (or before the file operation) of this name."""

    name: str
    number: int = 1
    part: float = 0.0  # of the usual time

    @property
    def freezes(self) -> bool:
        return self.name in BEFORE


@dataclass
class Timeline:
    """What a reporter's file says, read on as it grows."""

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

    def durations(self) -> dict[str, float]:
        """Usual seconds of each phase on rank 0."""
        begun: dict[str, list[float]] = defaultdict(list)
        seconds: dict[str, list[float]] = defaultdict(list)
        for _, rank, at, kind, name in self.lines:
            if rank == "0" and kind == "begin":
                begun[name].append(float(at))
            elif rank == "0" and kind == "end":
                seconds[name].append(float(at) - begun[name].pop())
        return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}

    def innermost(self, rank: str = "0") -> str:
        """The phase that was begun last and has not ended."""
        running: list[str] = []
        seen = False
        for _, of_rank, _, kind, name in self.lines:
            if of_rank != rank:
                continue
            seen = True
            if kind == "begin":
                running.append(name)
            elif kind == "end":
                running.remove(name)
        return running[-1] if running else ("between" if seen else "launch")

    def frozen(self) -> str | None:
        return next((line[4] for line in self.lines if line[3] == "frozen"), None)


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
        """SIGKILL to all that belongs to it; returns when none is left."""
        # First the workers that are known, at once, because the moment counts; then all others.
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

    def run_until(self, aim: Aim, usual: dict[str, float]) -> bool:
        """Kill it there. False if it ended before."""
        due = self.started + aim.part * usual["start"] if aim.name == "start" else None
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
                        due = float(at) + aim.part * usual.get(aim.name, 0.1)
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
    """Processes of a job, whatever sessions they are in."""
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
    exact: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    usual: dict[str, float] = field(default_factory=dict)
    options: tuple[Any, ...] = ()
    aims: tuple[str, ...] = ("start", *TIMED, *BEFORE)

    def argv(self, out: str, variant: str) -> list[str]:
        # Which rank samples what depends on their speed otherwise, see rollout/share.py.
        exact = ["--training.deterministic", "True"] if self.processes > 1 else []
        return self.world.argv(out, *COMMON, *VARIANTS[variant], *exact, *self.options)

    def truth(self, variant: str) -> Path:
        """Return the folder of an undisturbed run."""
        job = Job(self.argv(f"truth-{variant}", variant), self.processes, self.scratch)
        if code := job.wait():
            raise RuntimeError(f"undisturbed, exit code {code}: {job.stderr.read_text()}")
        first = next(line for line in job.timeline.lines if line[3:] == ["begin", "data"])
        self.usual = {**job.timeline.durations(), "start": float(first[2]) - job.started}
        return self.world.folder / f"truth-{variant}"

    def disturb(self, variant: str, out: str, kills: int, plan: Sequence[Aim] = ()) -> int:
        """Kill a run up to `kills` times, then let it end. Returns how often it was killed.

        Args:
            plan: where, the first times; then it is chosen.
        """
        argv, folder = self.argv(out, variant), self.world.folder / out
        killed = newest = 0
        while killed < kills:
            aim = plan[killed] if killed < len(plan) else self._aim(newest)
            freeze = f"{aim.name}:{aim.number}" if aim.freezes else ""
            log = _log_size(folder)
            job = Job(argv, self.processes, self.scratch, freeze)
            ended = not job.run_until(aim, self.usual)
            self._check_start(folder, newest, log)
            self.aimed[aim.name] += 1
            if ended:
                self._expect_zero(job, f"{out} after {killed} kills")
                return killed
            killed += 1
            self._note(job, folder)
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
        """What was aimed at least, or one of those.

        Args:
            newest: step of the newest checkpoint; without one nothing is resumed.
        """
        never = () if newest else ("resume",)
        fewest = min(self.aimed[name] for name in self.aims if name not in never)
        some = [n for n in self.aims if self.aimed[n] == fewest and n not in never]
        name = self.random.choice(some)
        # Operations on files come several at a time; a phase that is rare, not twice a life.
        most = {"rename": 3, "remove": 12, "write": 8}.get(name.partition(":")[0], 3)
        rare = name in ("validate", "export", "save", "make:checkpoint")
        once = name in ("start", "resume", "probe", "begin:end")
        number = self.random.randint(1, 1 if once else 2 if rare else most)
        return Aim(name, number, self.random.random())

    def _note(self, job: Job, folder: Path) -> None:
        """Where the last kill landed."""
        phase = job.timeline.innermost()
        frozen = job.timeline.frozen()
        self.landed["start" if phase in STARTING else phase] += 1
        if phase in STARTING:
            self.exact[f"start: {phase}"] += 1
        if frozen is not None:
            self.exact[f"before {_kind(frozen)}"] += 1
        publishing = frozen is not None and frozen.startswith(("rename:checkpoint", "rename:hf"))
        deleting = frozen is not None and frozen.startswith(("remove:checkpoint", "remove:hf"))
        self.landed["publish"] += publishing
        self.landed["delete"] += deleting
        writing = any((folder / "checkpoint").glob("step-*.tmp"))
        last = [line for line in job.timeline.lines if line[3] == "file"]
        own = any(".tmp" in line[4] and "checkpoint" in line[4] for line in last)
        self.landed["background"] += writing and own and phase != "save"

    def _check_start(self, folder: Path, newest: int, log: int) -> None:
        """It went on from the newest complete step, if it came that far."""
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


def _kind(operation: str) -> str:
    """`rename:checkpoint/step-12.tmp` as `rename checkpoint/step-N.tmp`."""
    verb, _, path = operation.partition(":")
    parts = Path(path).parts
    shown = ["".join("N" if c.isdigit() else c for c in part) for part in parts]
    while any("NN" in part for part in shown):
        shown = [part.replace("NN", "N") for part in shown]
    return f"{verb} {'/'.join(shown)}"


def _log_size(folder: Path) -> int:
    path = folder / "logs" / "rank-0.log"
    return path.stat().st_size if path.exists() else 0


def kill_anywhere(
    out: Path, kills: int, processes: int, seed: int = 0, variants: tuple[str, ...] = ("async",)
) -> Harness:
    """Kill jobs `kills` times in all; what was found is in `problems`."""
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
    print(f"\n{'phase':<24}kills")
    for name in dict.fromkeys((*PHASES, *sorted(harness.landed))):
        print(f"{name:<24}{harness.landed[name]}")
    print("\nof these at:")
    for name, count in sorted(harness.exact.items()):
        print(f"  {count:>3}  {name}")
    for problem in harness.problems:
        print(f"PROBLEM {problem}")
    missed = [name for name in PHASES if not harness.landed[name]]
    if missed:
        print(f"never hit: {', '.join(missed)}")
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
