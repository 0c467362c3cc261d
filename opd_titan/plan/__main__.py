"""`python -m opd_titan.plan --world-size 8,64 --gpu H200 --job.config_file recipe.toml ...`"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from opd_titan.config import JobConfig, load_config
from opd_titan.config.resolve import resolve
from opd_titan.errors import ConfigError, UserError, print_error

if TYPE_CHECKING:  # it imports torch
    from opd_titan.plan.cluster import Cluster

DESCRIPTION = """\
Print what a recipe needs on a cluster: memory of one device, traffic, work and time of a step,
whether it fits, and what to change if it does not. Needs no GPU and no weights; it reads only
config.json of each model. All other options are --table.key value, as in training."""

# Total memory in GiB as the driver reports it.
_MEMORY = {
    "H200": 139.8,
    "H100 80GB HBM3": 79.1,
    "A100-SXM4-80GB": 79.2,
    "A100-SXM4-40GB": 39.4,
    "B200": 178.4,
    "L40S": 44.4,
    "GeForce RTX 5090": 31.4,
    "GeForce RTX 4090": 23.6,
    "L4": 22.0,
}
# GiB that a run on a CPU uses before its first step, beyond the libraries: tokenizer, rows, kernels
# made at run time. Debug recipe, torch 2.13: 0.45 in all, 0.38 of it for libraries.
_CPU_RUN = 0.07


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(message.removeprefix("argument "))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the cluster's options. All other options belong to the recipe."""
    parser = _Parser(prog="plan", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--world-size", type=_counts, default=[8], help="number of devices, or several: 8,64,512"
    )
    parser.add_argument("--gpu", default="H200", help="device name, or cpu (default: H200)")
    parser.add_argument("--gpus-per-node", type=_count, default=8, help="default: 8")
    parser.add_argument("--gpu-memory", type=_positive, help="GiB of one device")
    parser.add_argument("--gpu-flops", type=_positive, help="dense bf16 TFLOP/s")
    parser.add_argument("--gpu-bandwidth", type=_positive, help="GB/s of the device's memory")
    parser.add_argument(
        "--node-bandwidth",
        type=_positive,
        default=450.0,
        help="GB/s per device inside a node (450)",
    )
    parser.add_argument(
        "--network-bandwidth",
        type=_positive,
        default=50.0,
        help="GB/s per device between nodes (50)",
    )
    parser.add_argument(
        "--reserve", type=_positive, help="GiB outside tensors: CUDA context, NCCL (default: 2.5)"
    )
    parser.add_argument("--prompt-tokens", type=_count, help="default: data.max_prompt_tokens")
    parser.add_argument("--response-tokens", type=_count, help="default: rollout.max_new_tokens")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def main(argv: list[str]) -> int:
    """Print the plan. Return 0 if the recipe fits on every cluster, 1 if not, 2 on bad input."""
    try:
        options, rest = make_parser().parse_known_args(argv)
        config = load_config(rest)
        # The trainer's code logs its choices, and torch warns about layouts, for every simulation.
        logging.disable(logging.WARNING)
        return _plan(config, options)
    except UserError as error:
        print_error(error)
        return 2
    finally:
        logging.disable(logging.NOTSET)


def _plan(config: JobConfig, options: argparse.Namespace) -> int:
    from opd_titan.plan.estimate import Estimate, estimate
    from opd_titan.plan.remedies import remedies
    from opd_titan.plan.report import assumptions, table
    from opd_titan.plan.simulate import Simulation, simulate

    prompt, response = _lengths(config, options)
    cluster = _cluster(options)
    columns = []

    def planned(changed: JobConfig, ranks: int) -> tuple[Simulation, Estimate]:
        where = replace(cluster, world_size=ranks)
        job = resolve(changed, "cuda" if cluster.on_cuda else "cpu", ranks)
        simulation = simulate(job, where, prompt, response)
        return simulation, estimate(job, where, simulation)

    def estimated(ranks: int, changed: JobConfig) -> Estimate:
        return planned(changed, ranks)[1]

    for size in options.world_size:
        columns.append((replace(cluster, world_size=size), *planned(config, size)))
    print(table(columns))
    for where, _, found in columns:
        if found.fits:
            continue
        changes, better = remedies(config, where, partial(estimated, where.world_size))
        said = f"On {where.world_size}, the peak (in {found.peak_phase}) does not fit"
        if better is not None:
            peak = better.peak / 2**30
            print(f"{said}; it fits with {' '.join(changes)}: {peak:.1f} GiB")
        else:
            print(f"{said}, even with {' '.join(changes)}; use more or larger devices")
    if columns[0][2].seconds:
        print(assumptions(cluster.assumed))
    return 0 if all(found.fits for _, _, found in columns) else 1


def _lengths(config: JobConfig, options: argparse.Namespace) -> tuple[int, int]:
    """Return the tokens of each prompt and response, by default the recipe's limits."""
    limits = {
        "prompt-tokens": ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        "response-tokens": ("rollout.max_new_tokens", config.rollout.max_new_tokens),
    }
    lengths = []
    for option, (key, limit) in limits.items():
        given = getattr(options, option.replace("-", "_")) or limit
        if given > limit:
            raise ConfigError(f"--{option}: {given} is more than {key} = {limit}")
        lengths.append(given)
    return lengths[0], lengths[1]


def _cluster(options: argparse.Namespace) -> Cluster:
    from opd_titan.observability.peaks import Peaks, device_peaks
    from opd_titan.plan.cluster import Cluster, GiB
    from opd_titan.rollout.memory import free_bytes

    on_cuda = options.gpu != "cpu"
    peaks = device_peaks(options.gpu) if on_cuda else Peaks()
    memory = options.gpu_memory or _MEMORY.get(options.gpu)
    if on_cuda and memory is None:
        raise ConfigError(
            f"--gpu: the memory of {options.gpu!r} is not known; give --gpu-memory in GiB, or one "
            f"of {', '.join(_MEMORY)}, cpu"
        )
    if on_cuda and (peaks.flops or options.gpu_flops) is None:
        raise ConfigError(f"--gpu: the speed of {options.gpu!r} is not known; give --gpu-flops")
    if on_cuda and (peaks.bandwidth or options.gpu_bandwidth) is None:
        raise ConfigError(f"--gpu: bandwidth of {options.gpu!r} is not known; give --gpu-bandwidth")
    import torch

    reserve = options.reserve or (2.5 if on_cuda else _own_bytes() / GiB)
    return Cluster(
        world_size=1,
        gpus_per_node=options.gpus_per_node,
        memory=memory * GiB if memory else free_bytes(torch.device("cpu")),
        reserve=reserve * GiB,
        flops=options.gpu_flops * 1e12 if options.gpu_flops else peaks.flops,
        bandwidth=options.gpu_bandwidth * 1e9 if options.gpu_bandwidth else peaks.bandwidth,
        node_bandwidth=options.node_bandwidth * 1e9,
        network_bandwidth=options.network_bandwidth * 1e9,
        on_cuda=on_cuda,
    )


def _own_bytes() -> float:
    """Return the resident memory of this process after it has imported what a run imports."""
    import datasets  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    import opd_titan.training.trainer  # noqa: F401

    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0]) + _CPU_RUN * 2**30


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
