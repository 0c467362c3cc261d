"""What `rollout.py` compares: a workload, and engines to run it.

An engine is called with a workload and the number of sequences that may run at once, and returns
the tokens that it sampled for each prompt and the seconds that took. Weights are random, because
the time that an engine takes does not depend on them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_setting import draw_weights
from torch import nn

from opd_titan.data.types import Prompt, Sample
from opd_titan.models.kernels import can_pack
from opd_titan.models.layers import Linear, join
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.runner import Runner
from opd_titan.rollout.sampler import sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.training.sources import ModelShape

# ------------------------------------------------------------------ the workload


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to sample for each."""

    prompts: list[tuple[int, ...]]
    new_tokens: list[int]

    def waves(self, size: int) -> Iterator[Workload]:
        for i in range(0, len(self.prompts), size):
            yield Workload(self.prompts[i : i + size], self.new_tokens[i : i + size])

    def shortened(self, most: int) -> Workload:
        return Workload(self.prompts, [min(most, n) for n in self.new_tokens])

    @property
    def longest(self) -> int:
        """Tokens of a sequence that no prompt with its response exceeds."""
        return max(map(len, self.prompts)) + max(self.new_tokens)

    def samples(self) -> list[Sample]:
        """Return samples of these lengths, for counting."""
        both = zip(self.prompts, self.new_tokens, strict=True)
        return [Sample(Prompt(i, "", p), 0, [0] * n, "length") for i, (p, n) in enumerate(both)]


def gsm8k_prompts(count: int, vocab: int, data: Path) -> list[tuple[int, ...]]:
    """Return questions of the training set.

    Args:
        vocab: token ids are taken modulo it, for a tiny model.
        data: a folder with gsm8k/train.jsonl and qwen3_tokenizer/.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "qwen3_tokenizer")
    with (data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(count)]
    texts = [f"Question: {q}\nAnswer:" for q in questions]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(t % vocab for t in row) for row in ids]


def nano_workload(count: int, shortest: int, longest: int, vocab: int) -> Workload:
    """Return nano-vllm's bench.py, draw by draw: its 256 requests ask for 133,966 tokens."""
    pick = random.Random(0)
    prompts = [
        tuple(pick.randint(0, 10000) % vocab for _ in range(pick.randint(shortest, longest)))
        for _ in range(count)
    ]
    return Workload(prompts, [pick.randint(shortest, longest) for _ in range(count)])


# ------------------------------------------------------------------- the engines


@dataclass
class Answer:
    """Tokens sampled for each prompt, seconds, and what else an engine measures."""

    tokens: list[int]
    seconds: float
    details: dict[str, float] = field(default_factory=dict)


Engine = Callable[[Workload, int], Answer]


@torch.no_grad()
def random_model(shape: ModelShape, device: torch.device) -> nn.Module:
    """Return our decoder in bf16, with its weights laid out as `GeneratorWeights` does."""
    with torch.device("meta"):
        model = shape.build().to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    model.tie_weights()
    packs = can_pack(torch.bfloat16, device)
    for layers in () if packs else model.layers_with_one_input():
        join(layers)
    draw_weights(model, shape.args.init_std)
    for module in model.modules() if packs else ():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.pack(module.weight)
    return model


class RunnerClock:
    """Measures our engine's prefills and decoding steps, each until the next one begins.

    On CUDA by the device's own clock, so that nothing waits for the measurement.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple[str, int, Any]] = []

    def _mark(self, kind: str, size: int = 0) -> None:
        now: Any = time.perf_counter()
        if self.on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((kind, size, now))

    @contextmanager
    def watch(self) -> Iterator[None]:
        def marked(kind: str) -> Callable[..., None]:
            method = getattr(Runner, kind)

            def call(runner: Runner, what: Any) -> None:
                self._mark(kind, what if kind == "decode" else len(what))
                method(runner, what)

            return call

        kinds = ("prefill", "decode")
        with patch.multiple(Runner, **{kind: marked(kind) for kind in kinds}):
            yield
        self._mark("end")

    def intervals(self) -> list[tuple[str, int, float]]:
        """Return ("prefill" or "decode", prefixes or sequences, seconds), in order."""
        if self.on_cuda:
            torch.cuda.synchronize()
        times = [t for _, _, t in self.marks]
        pairs = zip(times, times[1:], strict=False)
        took = [a.elapsed_time(b) / 1e3 if self.on_cuda else b - a for a, b in pairs]
        return [(kind, n, t) for (kind, n, _), t in zip(self.marks, took, strict=False)]


class Ours:
    """`Generator`; a wave at a time it shows what continuous batching is worth.

    Args:
        in_waves: no sequence starts before all of a wave have ended.
        keeps_rows: in waves, and sequences that have ended are computed until then, as in a static
            batch.
        checks_stop: look for a stop token after each step, as a run does; here none is ever found.

    Attributes:
        intervals: of the last call, see `RunnerClock`.
    """

    def __init__(
        self,
        model: nn.Module,
        in_waves: bool = False,
        keeps_rows: bool = False,
        checks_stop: bool = False,
        max_prefill_tokens: int = 8192,
    ) -> None:
        never = {model.args.vocab_size}
        self.generator = Generator(model, never, max_prefill_tokens=max_prefill_tokens)
        self.in_waves, self.keeps_rows = in_waves or keeps_rows, keeps_rows
        self.ignore_eos = not checks_stop
        self.intervals: list[tuple[str, int, float]] = []

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        # One limit for all, so that waves and rounds can share one cache.
        params = SamplingParams(max(work.new_tokens), ignore_eos=self.ignore_eos)
        clock = RunnerClock(self.generator.device)
        self.generator.max_concurrent = concurrent
        samples, forwards = [], 0
        start = time.perf_counter()
        with clock.watch():
            for wave in work.waves(concurrent if self.in_waves else len(work.prompts)):
                if self.keeps_rows:
                    wave = Workload(wave.prompts, [max(wave.new_tokens)] * len(wave.prompts))
                samples += self.generator.generate(_requests(wave), params)
                forwards += self.generator.stats.decode_forwards
        self.intervals = clock.intervals()  # waits for the device
        seconds = time.perf_counter() - start
        assert all(torch.isfinite(s.student_logprobs).all() for s in samples)
        details: dict[str, float] = {"forwards": forwards}
        for phase in ("prefill", "decode"):
            details[f"{phase}_s"] = sum(t for kind, _, t in self.intervals if kind == phase)
        wanted = zip(samples, work.new_tokens, strict=True)
        return Answer([min(len(s.response_ids), n) for s, n in wanted], seconds, details)


def _requests(work: Workload) -> list[Request]:
    both = zip(work.prompts, work.new_tokens, strict=True)
    return [Request(Prompt(i, "", p), 0, sequence_key(0, i), n) for i, (p, n) in enumerate(both)]


class Generate:
    """`transformers`' generate over left-padded batches. It gives no log-probs: less work."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        with device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        tokens: list[int] = []
        start = time.perf_counter()
        for wave in work.waves(concurrent):
            width = self._batch(wave)
            tokens += [min(n, width) for n in wave.new_tokens]
        return Answer(tokens, time.perf_counter() - start)

    @torch.no_grad()
    def _batch(self, work: Workload) -> int:
        """Return the tokens sampled for every prompt: as many as the longest response takes."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=max(work.new_tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        self.model.generation_config = config  # without a stop token
        longest, device = max(map(len, work.prompts)), self.model.device
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in work.prompts], device=device)
        lengths = torch.tensor([[len(p)] for p in work.prompts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths).long()
        out = self.model.generate(ids, attention_mask=mask, generation_config=config)
        return out.shape[1] - longest


class Vllm:
    """vLLM in a process and an environment of its own (`rollout_vllm.py`).

    Args:
        python: an interpreter that imports vllm.
        folder: has a config.json.
        longest: tokens of a sequence at most.
        log: the file that gets vLLM's own output.
        all_cores: compute on all cores of a CPU; by itself it keeps one for its other processes.

    Raises:
        RuntimeError: it does not start; later, it ended.
    """

    def __init__(
        self, python: str, folder: Path, longest: int, concurrent: int, log: Path, all_cores: bool
    ) -> None:
        self.log = log
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
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors, text=True, env=env, **pipes)
        self.version = self._read()["vllm"]

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
