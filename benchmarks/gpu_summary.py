"""The figures of `gpu.py` beside what the same card can do, and beside the goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
# PowerOPD (arXiv 2606.17199): 9.03 s and 60.72 GiB a step, 0.6B taught by 4B, 32 sequences of
# 1,024 new tokens, sampled token; the exact objective in 2.45 times that.
STEP_GIB = 60.72
GOALS = {
    "share of floor": 0.60,
    "nano": 18_000.0,
    "burst": 9_000.0,
    "update": 45.0,
    "score": 55.0,
    "step": 4.5,
    "exact": 1.3,
    "recovered": 0.80,
    "gap": 5e-4,
}


class Row(NamedTuple):
    """One line: what was measured, what the card could do, the goal, and whether it is reached."""

    work: str
    measured: str
    ceiling: str
    goal: str
    met: bool


def find(records: Sequence[Record], figure: str, **wanted: Any) -> list[Record]:
    found = [r for r in records if r.get("figure") == figure and "error" not in r]
    return [r for r in found if all(r.get(k) == v for k, v in wanted.items())]


def rows(records: Sequence[Record]) -> Iterator[Row]:
    yield from _decoding(records)
    yield from _rollouts(records)
    yield from _passes(records)
    yield from _steps(records)
    for r in find(records, "recipe"):
        share, goal = r.get("gap_recovered", 0.0), GOALS["recovered"]
        good = share >= goal and r["resumed"]
        resumed = "resumed" if r["resumed"] else "not resumed"
        yield Row("debug recipe", f"{share:.0%} of the gap, {resumed}", "", f"{goal:.0%}", good)
    for r in find(records, "gap"):
        goal, mean = GOALS["gap"], r["gap_mean"]
        work = f"mean log-prob gap, rollout against update, {r['model']}"
        yield Row(work, f"{mean:.1e}", "", f"{goal:.0e}", mean <= goal)


def _decoding(records: Sequence[Record]) -> Iterator[Row]:
    goal = GOALS["share of floor"]
    for r in find(records, "decoding step"):
        how = ", no graphs" if r.get("graphs") is False else ""
        work = f"decoding step, {r['size']}, batch {r['batch']}, context {r['context']}{how}"
        share = r["share_of_bandwidth"]
        measured = f"{r['ms_per_step']:.2f} ms, {share:.0%} of the floor"
        target = f"{goal:.0%}" if r["batch"] in (64, 256) else ""
        yield Row(work, measured, f"{r['floor_ms']:.2f} ms", target, share >= goal)


def _rollouts(records: Sequence[Record]) -> Iterator[Row]:
    goals = {("nano", "0.6B"): GOALS["nano"], ("burst", "8B"): GOALS["burst"]}
    names = {"nano": "256 requests of 100 to 1,024 tokens", "burst": "128 x 128 in, 1,024 out"}
    for r in find(records, "engine"):
        if "tokens_per_s" not in r:
            continue
        rate, goal = r["tokens_per_s"], goals.get((r["workload"], r["size"]))
        ceiling = f"{rate / r['share_of_floor']:,.0f}"
        target = "" if goal is None else f"{goal:,.0f}"
        work = f"{names[r['workload']]}, {r['size']}, tokens/s"
        yield Row(work, f"{rate:,.0f}", ceiling, target, goal is None or rate >= goal)


def _passes(records: Sequence[Record]) -> Iterator[Row]:
    for phase in ("update", "score"):
        for r in find(records, phase):
            how = ", compiled" if r["compile"] else ""
            count = f"{r['microbatches']} " if "microbatches" in r else ""
            work = f"{phase}, {r['size']}{how}, {count}micro-batches of {r['budget']:,}"
            best = find(records, f"{phase} ceiling", size=r["size"])
            ceiling = _mfu(best[-1]) if best else ""
            reached = r.get("mfu_percent", 0.0) >= GOALS[phase]
            measured = f"{_mfu(r)}, {r['peak_active_gib']:.1f} GiB"
            yield Row(work, measured, ceiling, f"{GOALS[phase]:.0f} % MFU", reached)


def _mfu(r: Record) -> str:
    rate = f"{r['tflops_per_s']:.4g} TFLOP/s"
    return f"{rate}, {r['mfu_percent']:.1f} % MFU" if "mfu_percent" in r else rate


def _steps(records: Sequence[Record]) -> Iterator[Row]:
    steps = find(records, "step")
    for r in steps:
        phases = ", ".join(f"{p} {r[p]:.3g}" for p in ("rollout", "teacher", "update"))
        how = ", compiled" if r["compile"] else ""
        sampled = r["objective"] == "policy_gradient"
        measured = f"{r['step']:.4g} s ({phases}), {r['peak_active_gib']:.1f} GiB"
        goal = f"{GOALS['step']} s, under {STEP_GIB} GiB" if sampled else ""
        good = r["step"] <= GOALS["step"] and r["peak_active_gib"] < STEP_GIB
        yield Row(f"step, 0.6B taught by 4B, {r['objective']}{how}", measured, "", goal, good)
    seconds = {r["objective"]: r["step"] for r in steps if not r["compile"]}
    if {"policy_gradient", "reverse_kl"} <= seconds.keys():
        ratio = seconds["reverse_kl"] / seconds["policy_gradient"]
        yield Row("exact over sampled step", f"{ratio:.2f}x", "", f"{GOALS['exact']}x",
                  ratio <= GOALS["exact"])  # fmt: skip


def problems(records: Sequence[Record]) -> Iterator[str]:
    """Errors, and checks that failed."""
    for r in records:
        name = " ".join(str(r[k]) for k in ("stage", "figure", "operator", "shape") if k in r)
        if "error" in r:
            yield f"FAILED: {name}: {r['error'].strip().splitlines()[-1][:300]}"
        elif r.get("ok") is False:
            yield f"NOT OK: {name}"


def summary(records: Sequence[Record], goals: bool) -> list[str]:
    """Markdown: the ceilings, a table of works, one of operators, and what failed.

    Args:
        goals: say whether they are reached; in miniature they mean nothing.
    """
    lines = []
    for r in find(records, "ceilings"):
        rate = f"products {_mfu(r)}"
        bandwidth = f"copy {r['copy_gb_per_s']:,.0f} GB/s, read {r['read_gb_per_s']:,.0f} GB/s"
        lines += [f"Ceilings of this device: {bandwidth}, {rate}.", ""]
    table = list(rows(records))
    if table:
        lines += ["| work | measured | ceiling here | goal | |", "|---|--:|--:|--:|---|"]
    for row in table:
        met = ("reached" if row.met else "missed") if goals and row.goal else ""
        lines.append(f"| {row.work} | {row.measured} | {row.ceiling} | {row.goal} | {met} |")
    operators = find(records, "operator")
    if operators:
        lines += ["", "| operator | type | shape | error | twin's | ms | GB/s | |"]
        lines += ["|---|---|---|--:|--:|--:|--:|---|"]
    for r in operators:
        time, rate = (f"{r[k]:.4g}" if k in r else "" for k in ("ms", "gb_per_s"))
        errors = f"{r['relative_error']:.1e} | {r['twin_error']:.1e}"
        good = "ok" if r["ok"] else "NOT OK"
        where = f"{r['operator']} | {r['dtype']} | {r['shape']}"
        lines.append(f"| {where} | {errors} | {time} | {rate} | {good} |")
    return [*lines, "", *problems(records)]
