"""Rollouts: our engine beside vLLM and `transformers`' generate, and beside the machine's floor.

    python benchmarks/rollout.py --setting small --data ../shared/data --vllm-python PYTHON
    python benchmarks/rollout.py --setting 0.6B --data ../shared/data --vllm-python PYTHON
    python benchmarks/rollout.py --setting ragged --shape small       # continuous batching or not
    python benchmarks/rollout.py --setting sampler --shape small      # projection and draw apart
    python benchmarks/rollout.py --setting h200 --out OUT             # on a GPU, under 10 minutes
    python benchmarks/rollout.py --setting h200 --miniature           # the same code, on any CPU

PYTHON is an interpreter that imports vllm, from an environment of its own. On a CPU vLLM keeps a
core for its other processes unless told otherwise; `vllm-all-cores` tells it. All engines have the
same weights (random, of true shapes, bf16), prompts and lengths; they take turns in rounds, so
that a ratio compares what ran side by side. Figures are printed and written to OUT/rollout.json as
they come, and as tables to OUT/rollout.md. `--model DIR` keeps the weights from one call to the
next.

The floor is what the workload takes at least: in each phase (prefill, decode) its bytes over the
bandwidth of a large read, or its FLOPs over the rate of the fastest of the model's own products
with as many rows, whichever is longer; both are measured in the same process.
"""

from __future__ import annotations

import os

# The parent must leave CUDA alone: its children are forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]  # a script's children may start anew

import rollout_cases as cases  # noqa: E402
from rollout_report import RolloutReport, summary, tables  # noqa: E402
from scale import Case, describe, run_case  # noqa: E402

SETTINGS = ("small", "0.6B", "ragged", "sampler", "h200")
ENGINES = {
    "small": "ours,vllm,vllm-all-cores,generate",
    "0.6B": "ours,vllm,vllm-all-cores,generate",
    "ragged": "ours,waves",
    "sampler": "ours",
    "h200": "ours,vllm",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--shape", choices=("small", "0.6B"), help="of ragged and sampler")
    parser.add_argument("--engines", help="of ours, waves, vllm, vllm-all-cores, generate")
    parser.add_argument("--data", type=Path, help="has gsm8k/ and qwen3_tokenizer/; none: random")
    parser.add_argument("--model", type=Path, help="the folder of the weights; made if absent")
    parser.add_argument("--vllm-python", help="default: this one, if it imports vllm")
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 2, in miniature 1")
    parser.add_argument("--requests", type=int, help="default: 32, 16, or 64 ragged ones")
    parser.add_argument("--concurrent", type=int, help="default: 32, or 16")
    parser.add_argument("--new-tokens", type=int, default=64, help="of small and 0.6B")
    parser.add_argument("--shortest", type=int, default=16, help="new tokens, of ragged")
    parser.add_argument("--longest", type=int, default=512, help="new tokens, of ragged")
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary, for trials")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--sizes", default="0.6B,8B", help="of h200")
    parser.add_argument("--only", help="of h200: some of nano,curve,sampler")
    parser.add_argument("--miniature", action="store_true", help="tiny models, for trials of h200")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "rollout")
    parser.add_argument("--time-limit", type=float, help="seconds; then no new part. h200: 540")
    a = parser.parse_args()
    a.shape = a.setting if a.setting in ("small", "0.6B") else a.shape or "small"
    a.engines = (a.engines or ENGINES[a.setting]).split(",")
    many = 32 if a.setting == "small" else 16
    a.concurrent = a.concurrent or many
    a.requests = a.requests or (64 if a.setting == "ragged" else a.concurrent)
    a.time_limit = a.time_limit or (540.0 if a.setting == "h200" else 1e5)
    return a


def plan(a: argparse.Namespace) -> Iterator[Case]:
    """What to run; on a GPU first what says most."""
    if a.setting == "sampler":
        yield Case("sampler", a.shape, partial(cases.measure_sampler, size=a.shape))
        return
    if a.setting != "h200":
        name = f"ragged {a.shape}" if a.setting == "ragged" else a.setting
        yield Case("compare", name, cases.measure_side_by_side)
        return
    sizes, modes = a.sizes.split(","), list(cases.CURVES)
    found = [Case("nano", f"{n}, ours", partial(cases.measure_nano, size=n)) for n in sizes]

    def curves(mode: str) -> list[Case]:
        run = partial(cases.measure_curve, mode=mode)
        return [Case("curve", f"{n}, {mode}", partial(run, size=n)) for n in sizes]

    found += curves(modes[0])
    found += [Case("sampler", n, partial(cases.measure_sampler, size=n)) for n in sizes]
    for mode in modes[1:]:
        found += curves(mode)
    for engine in (e for e in a.engines if e != "ours"):
        run = partial(cases.measure_nano, engine=engine)
        found += [Case("nano", f"{n}, {engine}", partial(run, size=n)) for n in sizes]
    yield from (c for c in found if not a.only or c.part in a.only.split(","))


def main() -> int:
    a = parse_arguments()
    report, start = RolloutReport(a.out), "fork"
    probe = cases.RolloutSetting(miniature=True, compile=False, warmup=0, repeats=1, options=a)
    about = list(run_case(start, describe, probe, 120.0))[-1]
    if not about.get("cuda") and Path("/dev/nvidiactl").exists():  # a fork that lost the device
        start = "spawn"
        about = list(run_case(start, describe, probe, 120.0))[-1]
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    report.head |= {**about, "options": options}
    print(json.dumps(report.head), flush=True)
    on_gpu = a.setting == "h200" and about.get("cuda") and not a.miniature
    if a.setting == "h200" and not on_gpu and not a.miniature:
        print("no CUDA device: --setting h200 needs one, or --miniature", file=sys.stderr)
        return 2
    s = cases.RolloutSetting(
        miniature=a.miniature,
        compile=False,
        warmup=1,
        repeats=a.rounds or (1 if a.miniature else 2 if on_gpu else 3),
        device_name="cuda" if on_gpu else "cpu",
        options=a,
    )
    skipped = []
    for case in plan(a):
        left = a.time_limit - report.seconds
        if left <= 0:
            skipped.append(f"{case.part} {case.name}")
            continue
        for record in run_case(start, case.run, s, left + 30.0):
            report.add(case, record)
    lines = summary(report) + [f"NOT STARTED, out of time: {name}" for name in skipped]
    text = "\n".join([*tables(report), "", *lines])
    print("\n" + text, flush=True)
    (a.out / "rollout.md").write_text(text + "\n", encoding="utf-8")
    report.write(summary=lines, skipped=skipped, seconds=report.seconds)
    return int(any("error" in r for r in report.results))


if __name__ == "__main__":
    sys.exit(main())
