"""Rollouts: our engine beside vLLM and `transformers`' generate, and beside the machine's floor.

    python benchmarks/rollout.py --setting small --data ../shared/data --vllm-python PYTHON
    python benchmarks/rollout.py --setting 0.6B --data ../shared/data --vllm-python PYTHON
    python benchmarks/rollout.py --setting ragged --shape small       # continuous batching or not
    python benchmarks/rollout.py --setting sampler --shape small      # projection and draw apart
    python benchmarks/rollout.py --setting nano --engines ours,vllm   # nano-vllm's, on a GPU

PYTHON is an interpreter that imports vllm, from an environment of its own. On a CPU vLLM keeps a
core for its other processes unless told otherwise; `vllm-all-cores` tells it. All engines have the
same prompts and lengths, and random weights of true shapes in bf16; they take turns in rounds, so
that a ratio compares what ran side by side. Figures are printed and written to OUT/rollout.json as
they come, and as tables to OUT/rollout.md.

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
import shlex  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from datetime import datetime, timezone  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]  # a script's children may start anew

import rollout_cases as cases  # noqa: E402
from apart import (  # noqa: E402
    Journal,
    Task,
    Work,
    commit,
    machine,
    print_record,
    run_apart,
    write_json,
)

HANGS = 7200.0  # seconds

ENGINES = {
    "small": "ours,vllm,vllm-all-cores,generate",
    "0.6B": "ours,vllm,vllm-all-cores,generate",
    "ragged": "ours,waves,batches",
    "sampler": "ours",
    "nano": "ours,vllm",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=tuple(ENGINES), default="small")
    parser.add_argument("--shape", choices=("small", "0.6B"), help="of ragged and sampler")
    parser.add_argument("--engines", help="of ours, waves, batches, vllm, vllm-all-cores, generate")
    parser.add_argument("--data", type=Path, help="has gsm8k/ and qwen3_tokenizer/; none: random")
    parser.add_argument("--vllm-python", help="default: this one, if it imports vllm")
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 2, in miniature 1")
    parser.add_argument("--requests", type=int, help="default: 32, 16, or 64 ragged ones")
    parser.add_argument("--concurrent", type=int, help="default: 32, or 16")
    parser.add_argument("--new-tokens", type=int, default=64, help="of small and 0.6B")
    parser.add_argument("--shortest", type=int, default=16, help="new tokens, of ragged")
    parser.add_argument("--longest", type=int, default=512, help="new tokens, of ragged")
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary, for trials")
    parser.add_argument("--sizes", default="0.6B,8B", help="of nano")
    parser.add_argument("--miniature", action="store_true", help="tiny models, for trials of nano")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "rollout")
    a = parser.parse_args()
    a.shape = a.setting if a.setting in ("small", "0.6B") else a.shape or "small"
    a.engines = (a.engines or ENGINES[a.setting]).split(",")
    a.concurrent = a.concurrent or (32 if a.setting == "small" else 16)
    a.requests = a.requests or (64 if a.setting == "ragged" else a.concurrent)
    return a


def plan(a: argparse.Namespace) -> Iterator[tuple[str, str, Work]]:
    """Part, case, and what to run."""
    if a.setting == "sampler":
        yield "sampler", a.shape, partial(cases.measure_sampler, size=a.shape)
    elif a.setting == "nano":  # alone: on a GPU nothing else may hold memory meanwhile
        for size in a.sizes.split(","):
            for engine in a.engines:
                run = partial(cases.measure_engines, size=size, engines=[engine])
                yield "nano", f"{size}, {engine}", run
    else:
        name = f"ragged {a.shape}" if a.setting == "ragged" else a.setting
        run = partial(cases.measure_engines, size=a.shape, engines=a.engines)
        yield "compare", name, run


# --------------------------------------------------------------------- the report

# By figure: its table's columns, and what they say.
_TABLES = {
    "floor": (
        "floor of | tokens in | out | floor s | read GB/s"
        " | prefill s by bytes | by FLOPs | TFLOP/s | decode s by bytes | by FLOPs | TFLOP/s",
        "{title}: {requests} requests, {concurrent} at once | {prompt_tokens:,} | {new_tokens:,}"
        " | {seconds:.3g} | {read_gb_per_s:.4g}"
        " | {prefill_bytes_s:.3g} | {prefill_flops_s:.3g} | {prefill_tflops_per_s:.3g}"
        " | {decode_bytes_s:.3g} | {decode_flops_s:.3g} | {decode_tflops_per_s:.3g}",
    ),
    "engine": (
        "engine@concurrent | tokens/s, median | by round | prefill s | decode s | share of floor"
        " | decode, of bandwidth",
        "{title}: {engine} | {tokens_per_s:,.0f} | {by_round} | {prefill_s:.3g} | {decode_s:.3g}"
        " | {share_of_floor:.1%} | {decode_share_of_bandwidth:.1%}",
    ),
    "sampler": (
        "head | rows | projection ms | projection and draw ms | floor ms",
        "{title} | {rows} | {project_ms:.3g} | {project_and_draw_ms:.3g} | {floor_ms:.3g}",
    ),
}


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Markdown: the machine, then a table for each kind of figure."""
    results = report["results"]
    vllm = next((f", vLLM {r['vllm']}" for r in results if "vllm" in r), "")
    yield "    {command}\n".format(**report)
    versions = "Python {python}, torch {torch}, transformers {transformers}".format(**report)
    where = "{device}, {threads} threads, {0}{1}, {date}, commit {commit}.\n"
    yield where.format(versions, vllm, **report)
    for figure, (columns, cells) in _TABLES.items():
        found = [r for r in results if r.get("figure") == figure and "error" not in r]
        lines = [columns, "---" + " | --:" * columns.count("|")] if found else []
        for r in found:
            title = r["case"] if r["part"] == "compare" else f"{r['part']} {r['case']}"
            by_round = ", ".join(f"{x:,.0f}" for x in r.get("rounds", ()))
            row = []
            for cell in cells.split(" | "):
                try:
                    row.append(cell.format(**r, title=title, by_round=by_round))
                except KeyError:  # not every engine knows its phases
                    row.append("")
            lines.append(" | ".join(row))
        yield "".join(f"| {line} |\n" for line in lines)


def summary(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Ratios, shares of the memory's bandwidth, and what failed."""
    for r in results:
        if "error" in r:
            who = f" {r['engine']}:" if "engine" in r else ""
            yield f"FAILED: {r['part']} {r['case']}:{who} {r['error'].splitlines()[-1]}"
        elif r.get("figure") == "ratio":
            rounds = ", ".join(f"{x:.2f}" for x in r["rounds"])
            yield f"{r['case']}: {r['of']} over {r['to']}: {r['ratio']:.2f}; {rounds}"
        elif r["part"] == "nano" and "decode_share_of_bandwidth" in r:
            share = f"{r['decode_share_of_bandwidth']:.0%} of the bandwidth"
            yield f"nano {r['case']}: {r['tokens_per_s']:,.0f} tokens/s; decoding at {share}"


def main() -> int:
    a = parse_arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(a.out / "rollout.jsonl")
    journal.begin()
    start, about = machine(cases.RolloutSetting(miniature=True, options=a), a.out, journal)
    report = {
        **about,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()},
        "command": shlex.join(["python", "benchmarks/rollout.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "results": [],
    }
    print(json.dumps(report), flush=True)
    on_gpu = a.setting == "nano" and about["cuda"]
    s = cases.RolloutSetting(
        miniature=a.miniature,
        warmup=1,
        repeats=a.rounds or (1 if a.miniature else 2 if on_gpu else 3),
        device_name="cuda" if on_gpu else "cpu",
        options=a,
    )
    begun = time.monotonic()
    for part, case, work in plan(a):
        task = Task({"part": part, "case": case}, (work,), a.out / "rollout.log")
        for record in run_apart(start, task, s, HANGS, journal):
            report["results"].append(record)
            print_record(f"{part} {case}", record, time.monotonic() - begun)
        write_json(a.out / "rollout.json", report)
    text = "\n".join([*tables(report), *summary(report["results"])])
    print("\n" + text, flush=True)
    (a.out / "rollout.md").write_text(text + "\n", encoding="utf-8")
    return int(any("error" in r for r in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
