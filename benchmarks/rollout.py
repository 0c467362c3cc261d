"""How fast are rollouts on a CPU, beside vLLM, `transformers`' generate and the machine's limit?

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
import json
import os
import random
import subprocess
import tempfile
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Record, alternate, emit, machine, parser, ratio, table
from qwen3_shapes import MINIATURE, SMALL, write_config
from rollout_limits import (
    Answer,
    Engine,
    Ours,
    Workload,
    engine_figures,
    measure_limit,
    random_model,
)
from setting import Setting

from opd_titan.config.resolve import ModelSpec
from opd_titan.training.sources import inspect_shape

ENGINES = {
    "small": "ours,vllm,vllm-all-cores,generate",
    "0.6B": "ours,vllm,vllm-all-cores,generate",
    "ragged": "ours,static",
}


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--setting", choices=ENGINES, default="small")
    arguments.add_argument("--engines", help="some of ours,static,vllm,vllm-all-cores,generate")
    arguments.add_argument(
        "--data", type=Path, required=True, help="of gsm8k/ and qwen3_tokenizer/"
    )
    arguments.add_argument("--vllm-python", help="an interpreter that imports vllm")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--requests", type=int, help="default: --concurrent, or 64 if ragged")
    arguments.add_argument("--concurrent", type=int, help="at once; default: 32 small, else 16")
    arguments.add_argument("--new-tokens", type=int, default=64)
    arguments.add_argument("--shortest", type=int, default=16, help="new tokens of ragged")
    arguments.add_argument("--longest", type=int, default=512, help="new tokens of ragged")
    arguments.add_argument("--miniature", action="store_true", help="a tiny model")
    a = arguments.parse_args()
    a.engines = (a.engines or ENGINES[a.setting]).split(",")
    a.concurrent = a.concurrent or (32 if a.setting == "small" else 16)
    a.requests = a.requests or (64 if a.setting == "ragged" else a.concurrent)
    if not a.vllm_python and any(engine.startswith("vllm") for engine in a.engines):
        arguments.error("--vllm-python: name an interpreter with vllm, or other --engines")
    return a


def gsm8k_prompts(count: int, vocab: int, data: Path) -> list[tuple[int, ...]]:
    """Return questions of the training set, with token ids modulo `vocab`, for a tiny model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "qwen3_tokenizer")
    with (data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(count)]
    texts = [f"Question: {q}\nAnswer:" for q in questions]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(t % vocab for t in row) for row in ids]


class Generate:
    """`transformers`' generate over left-padded batches. It gives no log-probs: less work."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        tokens: list[int] = []
        start = time.perf_counter()
        for batch in work.batches(concurrent):
            width = self._sample(batch)
            tokens += [min(n, width) for n in batch.new_tokens]
        return Answer(tokens, time.perf_counter() - start)

    @torch.no_grad()
    def _sample(self, work: Workload) -> int:
        """Return the tokens sampled for every prompt: as many as the longest response takes."""
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(max_new_tokens=max(work.new_tokens), pad_token_id=0, **sampling)
        self.model.generation_config = config  # without a stop token
        longest = max(map(len, work.prompts))
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in work.prompts])
        lengths = torch.tensor([[len(p)] for p in work.prompts])
        mask = (torch.arange(longest) >= longest - lengths).long()
        out = self.model.generate(ids, attention_mask=mask, generation_config=config)
        return out.shape[1] - longest


class Vllm:
    """vLLM in a process and an environment of its own (`rollout_vllm.py`).

    Args:
        folder: has a config.json, and gets the log of vLLM.
        all_cores: compute on all cores of a CPU; by itself it keeps one for its other processes.

    Raises:
        RuntimeError: it does not start; later, it ended.
    """

    def __init__(
        self, python: str, folder: Path, longest: int, concurrent: int, all_cores: bool
    ) -> None:
        self.log = folder / f"vllm-{all_cores}.log"
        script = Path(__file__).with_name("rollout_vllm.py")
        command = [python, str(script), str(folder), "--max-num-seqs", str(concurrent)]
        command += ["--max-model-len", str(longest + -longest % 256)]
        # It chooses its own threads and has its own packages.
        hidden = ("OMP_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV")
        env = {k: v for k, v in os.environ.items() if k not in hidden}
        if all_cores:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            env["VLLM_CPU_OMP_THREADS_BIND"] = cores
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors, text=True, env=env, **pipes)
        emit({"figure": "vLLM", "all cores": all_cores, **self._read()})

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"vLLM ended with exit code {code}: {' | '.join(last)}")
        return json.loads(line)

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        del concurrent  # set at its start
        request = {"prompts": work.prompts, "new_tokens": work.new_tokens}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Answer(**self._read())

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.process.kill()


def compare(a: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    device = torch.device("cpu")
    s = Setting(miniature=a.miniature, warmup=1, device=device)
    changes: Record = {} if a.setting == "0.6B" else SMALL | {"head_dim": 32}
    write_config("0.6B", folder, **(MINIATURE if a.miniature else changes))
    shape = inspect_shape(ModelSpec("student", str(folder), "student.hf_path"), 1)
    pick = random.Random(0)
    span = (a.shortest, a.longest) if a.setting == "ragged" else (a.new_tokens, a.new_tokens)
    prompts = gsm8k_prompts(a.requests, shape.args.vocab_size, a.data)
    work = Workload(prompts, [pick.randint(*span) for _ in prompts])
    limit = measure_limit(s, shape.args, work, a.concurrent)

    def start(name: str) -> Engine:
        if name == "generate":
            return Generate(folder)
        if name.startswith("vllm"):
            engine = Vllm(a.vllm_python, folder, work.longest, a.concurrent, name != "vllm")
            return stack.enter_context(closing(engine))
        return Ours(random_model(shape, device), static=name == "static")

    def run(engine: Engine, part: Workload) -> Answer:
        answer = engine(part, a.concurrent)
        if answer.tokens != part.new_tokens:
            raise RuntimeError(f"{sum(answer.tokens)} tokens, not {sum(part.new_tokens)}")
        return answer

    # vLLM first, because it looks at how much memory is free.
    order = sorted(a.engines, key=lambda name: not name.startswith("vllm"))
    engines = {name: start(name) for name in order}
    short = Workload(work.prompts, [min(4, n) for n in work.new_tokens])
    for engine in engines.values():
        run(engine, short)  # warm-up
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
