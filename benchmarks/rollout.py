"""Rollouts on a CPU: our engine beside vLLM and `transformers`' generate, and beside the limit.

    python benchmarks/rollout.py --setting small --data ../shared/data --vllm-python PYTHON
    python benchmarks/rollout.py --setting 0.6B --data ../shared/data --vllm-python PYTHON
    python benchmarks/rollout.py --setting ragged --data ../shared/data    # continuous batching

PYTHON is an interpreter that imports vllm, from an environment of its own. By itself vLLM keeps a
core for its other processes; `vllm-all-cores` is bound to all. All engines have the same prompts
and lengths, and random weights of true shapes in bf16, and take turns in rounds. For the limit see
`rollout_limits.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from harness import Record, alternate, emit, machine, ratio, table
from qwen3_shapes import SMALL, write_config

SETTINGS = {
    "small": "ours,vllm,vllm-all-cores,generate",
    "0.6B": "ours,vllm,vllm-all-cores,generate",
    "ragged": "ours,waves,batches",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--engines", help="some of ours,waves,batches,vllm,vllm-all-cores,generate")
    parser.add_argument("--data", type=Path, required=True, help="has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--vllm-python", help="an interpreter that imports vllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="default: as many as at once; 64 ragged ones")
    parser.add_argument("--concurrent", type=int, help="at once; default: 32 small, else 16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=16, help="new tokens of ragged")
    parser.add_argument("--longest", type=int, default=512, help="new tokens of ragged")
    parser.add_argument("--miniature", action="store_true", help="a tiny model")
    a = parser.parse_args()
    a.engines = (a.engines or SETTINGS[a.setting]).split(",")
    a.concurrent = a.concurrent or (32 if a.setting == "small" else 16)
    a.requests = a.requests or (64 if a.setting == "ragged" else a.concurrent)
    if not a.vllm_python and any(engine.startswith("vllm") for engine in a.engines):
        parser.error("--vllm-python: wanted an interpreter that imports vllm, or other --engines")
    return a


def compare(a: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    import random

    import torch
    from gpu_setting import Setting
    from rollout_engines import (
        Answer,
        Engine,
        Generate,
        Ours,
        Vllm,
        Workload,
        gsm8k_prompts,
        random_model,
    )
    from rollout_limits import engine_figures, measure_limit

    from opd_titan.config.resolve import ModelSpec
    from opd_titan.training.sources import inspect_shape

    device = torch.device("cpu")
    s = Setting(miniature=a.miniature, warmup=1, device=device)
    small = {} if a.setting == "0.6B" else SMALL | {"head_dim": 32, "eos_token_id": 151645}
    write_config("0.6B", folder, miniature=a.miniature, **({} if a.miniature else small))
    shape, pick = (
        inspect_shape(ModelSpec("student", str(folder), "student.hf_path"), 1),
        random.Random(0),
    )
    span = (a.shortest, a.longest) if a.setting == "ragged" else (a.new_tokens, a.new_tokens)
    prompts = gsm8k_prompts(a.requests, shape.args.vocab_size, a.data)
    work = Workload(prompts, [pick.randint(*span) for _ in prompts])
    limit = measure_limit(s, shape.args, work, a.concurrent)

    def start(name: str) -> Engine:
        if name == "generate":
            return Generate(folder, device)
        if name.startswith("vllm"):
            log, all_cores = folder / f"{name}.log", name == "vllm-all-cores"
            engine = Vllm(a.vllm_python, folder, work.longest, a.concurrent, log, all_cores)
            emit({"figure": "vLLM", "engine": name, "version": engine.version})
            return stack.enter_context(closing(engine))
        model = random_model(shape, device)
        return Ours(model, in_waves=name == "waves", keeps_rows=name == "batches")

    def run(engine: Engine, part: Workload) -> Answer:
        answer = engine(part, a.concurrent)
        if answer.tokens != part.new_tokens:
            raise RuntimeError(f"{sum(answer.tokens)} tokens, not {sum(part.new_tokens)}")
        return answer

    # vLLM first, because it looks at how much memory is free.
    order = sorted(a.engines, key=lambda name: not name.startswith("vllm"))
    engines = {name: start(name) for name in order}
    for engine in engines.values():
        run(engine, work.shortened(4))  # warm-up
    found = alternate({n: partial(run, e, work) for n, e in engines.items()}, a.rounds)
    rows: list[Record] = []
    for name in a.engines:
        figures = engine_figures(found[name], limit)
        rows.append({"engine": name, "at once": a.concurrent, **figures})
        if "ours" in found:
            seconds = [[x.seconds for x in found[n]] for n in (name, "ours")]
            rows[-1]["ours over it"] = ratio(*seconds)
    print(table(rows))


def main() -> None:
    a = parse_arguments()
    emit(machine())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        compare(a, Path(folder), stack)


if __name__ == "__main__":
    main()
