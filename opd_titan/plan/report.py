"""The plan as text: a column for each size of the cluster."""

from __future__ import annotations

from opd_titan.plan.cluster import Assumed, Cluster, GiB
from opd_titan.plan.estimate import Estimate
from opd_titan.plan.simulate import Simulation

Column = tuple[Cluster, Simulation, Estimate]


def table(columns: list[Column]) -> str:
    """Return all figures of the plan: memory in GiB of one device, times in seconds of a step."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, values: list[str]) -> None:
        if any(v.strip("-0. ") for v in values):
            rows.append((name, values))

    on_cuda = columns[0][0].on_cuda
    add("devices" if on_cuda else "processes", [f"{c.world_size}" for c, _, _ in columns])
    add("mesh", [_mesh(s) for _, s, _ in columns])
    rows.append((f"memory, GiB of one {'device' if on_cuda else 'process'}", []))
    for name in columns[0][1].resident:
        add(f"  {name}", [_gib(s.resident[name]) for _, s, _ in columns])
    add("  gradients", [_gib(s.gradients) for _, s, _ in columns])
    add("  kept gathered, update", [_gib(s.kept.extra) for _, s, _ in columns])
    add("  KV cache", [_gib(s.rollout.kv_cache) for _, s, _ in columns])
    add("  activations, update", [_gib(_activations(s)) for _, s, _ in columns])
    add("  reserved", [_gib(c.reserve) for c, _, _ in columns])
    for phase in columns[0][1].phases:
        add(f"  alive in {phase}", [_gib(s.phases[phase].peak) for _, s, _ in columns])
    add("  PEAK", [f"{_gib(e.peak)}" for _, _, e in columns])
    add("  of", [_gib(c.memory) for c, _, _ in columns])
    add("  fits", ["yes" if e.fits else "NO" for _, _, e in columns])
    stays = {True: "stays", False: "freed"}
    add("  generator's copy, cache", [stays[s.stays] for _, s, _ in columns])
    add("sequences decoded at once", [f"{s.rollout.slots}" for _, s, _ in columns])
    add("  mean", [_mean_rows(s) for _, s, _ in columns])
    rollouts = [s.rollout for _, s, _ in columns]
    add("  pages x tokens", [f"{r.pages:,} x {r.page_size}" for r in rollouts if r.pages])
    add("  steps", [f"{s.rollout.decode_forwards:,}" for _, s, _ in columns])
    add("  preempted", [f"{s.rollout.preempted:,}" for _, s, _ in columns])
    rows.append(("sent by one device per step, GB", []))
    for phase in columns[0][1].phases:
        add(f"  {phase}", [_gb(sum(s.phases[phase].sent.values())) for _, s, _ in columns])
    rows.append(("work per step of all devices, PFLOP", []))
    for phase in columns[0][2].flops:
        add(f"  {phase}", [f"{e.flops[phase] / 1e15:.2f}" for _, _, e in columns])
    if columns[0][2].seconds:
        _add_times(rows, columns)
    return _aligned(rows)


def _add_times(rows: list[tuple[str, list[str]]], columns: list[Column]) -> None:
    rows.append(("estimated seconds per step (of them waiting for links)", []))
    for phase in columns[0][2].seconds:
        cells = []
        for _, _, e in columns:
            s = e.seconds[phase]
            cells.append(f"{s.total:.2f} ({s.total - s.busy:.2f})")
        rows.append((f"  {phase}", cells))
    rows.append(("  STEP", [f"{e.step_seconds:.2f}" for _, _, e in columns]))
    rates = []
    for c, simulation, e in columns:
        tokens = sum(len(sample.response_ids) for sample in simulation.samples)
        rates.append(tokens / e.step_seconds / c.world_size)
    rows.append(("response tokens/s/device", [f"{r:,.0f}" for r in rates]))
    rows.append(("scaling efficiency", [f"{100 * r / rates[0]:.0f} %" for r in rates]))


def assumptions(assumed: Assumed) -> str:
    """Return the assumptions of the estimated times, in one paragraph."""
    return (
        f"Assumed: {assumed.scoring:.0%} of peak FLOP/s in scoring, {assumed.training:.0%} in the "
        f"update (at least {assumed.layer * 1e3:.0f} ms per layer and micro-batch), "
        f"{assumed.memory:.0%} of memory bandwidth in decoding, {assumed.links:.0%} of a link in "
        f"collectives and {assumed.latency * 1e6:.0f} us per rank of their ring, "
        f"{assumed.kernel * 1e6:.1f} us per kernel of a decoding step's graph "
        f"({assumed.launch * 1e6:.0f} us where the host launches it), "
        f"{assumed.slack:.0%} of live memory lost in the allocator. Every sample has the planned "
        f"lengths; data-parallel traffic hides behind computing, tensor-parallel traffic does not."
    )


def _mean_rows(simulation: Simulation) -> str:
    tokens = sum(len(s.response_ids) for s in simulation.rollout_share)
    rollout = simulation.rollout
    return f"{tokens / max(1, rollout.decode_forwards):.1f}" if rollout.slots else "-"


def _mesh(simulation: Simulation) -> str:
    return " x ".join(f"{axis} {ranks}" for axis, ranks in simulation.axes.items())


def _activations(simulation: Simulation) -> float:
    """Return the update's peak without resident memory, gradients and gathered tensors."""
    resident = sum(v for n, v in simulation.resident.items() if n != "generator weights")
    kept = simulation.gradients + simulation.kept.extra
    return max(0, simulation.phases["update"].peak - resident - kept)


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _aligned(rows: list[tuple[str, list[str]]]) -> str:
    left = max(len(name) for name, _ in rows)
    widths = [
        max(len(values[i]) for _, values in rows if values)
        for i in range(max(len(values) for _, values in rows))
    ]
    lines = []
    for name, values in rows:
        cells = "".join(f"  {v:>{w}}" for v, w in zip(values, widths, strict=False))
        lines.append(f"{name:<{left}}{cells}".rstrip())
    return "\n".join(lines)
