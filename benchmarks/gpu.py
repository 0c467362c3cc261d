"""What a GPU is to show, in calls of a few minutes: correctness, speed, and the goals.

    python benchmarks/gpu.py --plan first --seconds 280 --out OUT    # the most valuable first
    python benchmarks/gpu.py --plan second --seconds 280 --out OUT2
    python benchmarks/gpu.py --only decode,update --out OUT3         # by name; all: --plan all
    python benchmarks/gpu.py --miniature                             # tiny, on a CPU

Random weights of true shapes; no data, no checkpoints and no network are needed. Each stage is a
process in a group of its own with a limit. Every figure is in OUT/results.jsonl as soon as it is
there, OUT/stages.json is complete after each stage, OUT/STAGE.log has what was printed, and
OUT/summary.md the table beside the ceilings of the same card and the goals.
"""

from __future__ import annotations

import os

# The parent must leave CUDA alone: its children are forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Before torch is imported: memory that one stage's model gave back serves the next.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import argparse  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from datetime import datetime, timezone  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]  # a script's children may start anew

from apart import Journal, Task, commit, machine, print_record, run_apart, write_json  # noqa: E402
from gpu_setting import Setting  # noqa: E402
from gpu_stages import COMPILED, ENVIRONMENT, PLANS, Stage  # noqa: E402
from gpu_summary import summary  # noqa: E402

SHORTEST = 8.0  # seconds: a stage with less than that left does not start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in PLANS["all"]]
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--plan", choices=tuple(PLANS), default="first")
    parser.add_argument("--only", help=f"of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=280.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "gpu" / now)
    parser.add_argument("--miniature", action="store_true", help="tiny models")
    a = parser.parse_args()
    chosen = [stage.name for stage in PLANS[a.plan]]
    if a.miniature:
        chosen = [name for name in chosen if not name.endswith(COMPILED)]
    if a.only:
        chosen = a.only.split(",")
    unknown = set(chosen).difference(names)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: wanted some of {', '.join(names)}")
    a.stages = [ENVIRONMENT, *(stage for stage in PLANS["all"] if stage.name in chosen)]
    return a


class Session:
    """One call: its records, and what became of each stage."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.begun, self.total, self.out = time.monotonic(), a.seconds, a.out
        self.journal = Journal(a.out / "results.jsonl")
        self.journal.begin()
        self.state: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "miniature": a.miniature,
            "stages": [],
        }

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def run(self, start: str, stages: Sequence[Stage], s: Setting) -> None:
        for stage in stages:
            self._run(start, stage, s)
            self.write()

    def write(self) -> None:
        write_json(self.out / "stages.json", {**self.state, "seconds": self.seconds})

    def _run(self, start: str, stage: Stage, s: Setting) -> None:
        left, begun, problems = self.total - self.seconds, self.seconds, 0
        found: dict[str, Any] = {"stage": stage.name, "ended": "not finished"}
        self.state["stages"].append(found)
        if left < SHORTEST:
            found["ended"] = "not started: out of time"
            print(f"[{begun:5.0f} s] {stage.name}: {found['ended']}", flush=True)
            return
        task = Task({"stage": stage.name}, stage.works, self.out / f"{stage.name}.log")
        # What a compiler was writing when its stage was stopped must not be another's.
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for record in run_apart(start, task, s, min(stage.limit, left - 2.0), self.journal):
                problems += "error" in record or record.get("ok") is False
                print_record(stage.name, record, self.seconds)
        found |= {"ended": f"{problems} problems" if problems else "well"}
        found["seconds"] = self.seconds - begun

    def finish(self) -> int:
        """Print and write the summary; 1 if anything failed."""
        self.write()
        ended = {f["stage"]: f["ended"] for f in self.state["stages"]}
        lines = [f"    {self.state['command']}", ""]
        about = "{device}, Python {python}, torch {torch}, {date}, commit {commit}."
        lines += [about.format(**self.state), ""] if "device" in self.state else []
        lines += summary(self.journal.read(), goals=not self.state["miniature"])
        lines += [f"{name}: {how}" for name, how in ended.items() if how.startswith("not")]
        text = "\n".join(lines)
        print("\n" + text, flush=True)
        (self.out / "summary.md").write_text(text + "\n", encoding="utf-8")
        return int(any(how != "well" for how in ended.values()))


def main() -> int:
    a = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with a summary, and no orphans
    session = Session(a)
    try:
        probe = Setting.small() if a.miniature else Setting(miniature=False)
        start, about = machine(probe, a.out, session.journal)
        session.state |= about
        if not about["cuda"] and not a.miniature:
            print("no CUDA device: wanted one, or --miniature", file=sys.stderr)
            return 2
        session.run(start, a.stages, probe)
    finally:
        code = session.finish()
    return code


if __name__ == "__main__":
    sys.exit(main())
