"""What `rollout.py` compares: a workload, and engines to run it.

An engine is called with a workload and the number of sequences that may run at once, and answers
with the tokens it sampled for each prompt and the seconds that took. Weights are random: what an
engine takes does not depend on them.
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
from torch import nn

from opd_titan.data.types import Prompt, Sample
from opd_titan.models.kernels import can_pack
from opd_titan.models.layers import Linear, join
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.runner import Runner
from opd_titan.rollout.sampler import sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.training.models import ModelShape

# Qwen3 tokens of the first 64 GSM8K training questions as "Question: ...\nAnswer:".
GSM8K_LENGTHS = (
    *(42, 35, 64, 57, 30, 69, 61, 110, 113, 71, 80, 101, 43, 71, 34, 74, 60, 84, 68, 68, 76, 55),
    *(61, 61, 85, 97, 59, 89, 57, 59, 59, 67, 119, 72, 47, 53, 51, 84, 74, 78, 47, 74, 70, 58, 72),
    *(87, 46, 59, 53, 60, 77, 67, 53, 63, 71, 39, 65, 64, 79, 93, 61, 104, 44, 90),
)


# ------------------------------------------------------------------ the workload


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to sample for each."""

    prompts: list[tuple[int, ...]]
    new_tokens: list[int]

    def first(self, count: int) -> Workload:
        return Workload(self.prompts[:count], self.new_tokens[:count])

    def waves(self, size: int) -> Iterator[Workload]:
        for i in range(0, len(self.prompts), size):
            yield Workload(self.prompts[i : i + size], self.new_tokens[i : i + size])

    @property
    def longest(self) -> int:
        """Tokens of a sequence that no prompt with its response exceeds."""
        return max(map(len, self.prompts)) + max(self.new_tokens)

    def samples(self) -> list[Sample]:
        """As if it had been answered; for counting."""
        both = zip(self.prompts, self.new_tokens, strict=True)
        return [Sample(Prompt(i, "", p), 0, [0] * n, "length") for i, (p, n) in enumerate(both)]


def gsm8k_prompts(count: int, vocab: int, data: Path | None) -> list[tuple[int, ...]]:
    """Questions of the training set; without `data` random tokens of the same lengths.

    Args:
        data: a folder with gsm8k/train.jsonl and qwen3_tokenizer/.
    """
    if data is None:
        pick, lengths = random.Random(0), (GSM8K_LENGTHS * -(-count // 64))[:count]
        return [tuple(pick.randrange(vocab) for _ in range(n)) for n in lengths]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "qwen3_tokenizer")
    with (data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(count)]
    texts = [f"Question: {q}\nAnswer:" for q in questions]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(t % vocab for t in row) for row in ids]  # a cut vocabulary has no more


def nano_workload(count: int, shortest: int, longest: int, vocab: int) -> Workload:
    """nano-vllm's bench.py, draw by draw: its 256 requests ask for 133,966 tokens."""
    pick = random.Random(0)
    prompts = [
        tuple(pick.randint(0, 10000) % vocab for _ in range(pick.randint(shortest, longest)))
        for _ in range(count)
    ]
    return Workload(prompts, [pick.randint(shortest, longest) for _ in range(count)])


# ------------------------------------------------------------------- the engines


@dataclass
class Answer:
    """Tokens sampled for each prompt, seconds, and what else an engine has to say."""

    tokens: list[int]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


Engine = Callable[[Workload, int], Answer]


@torch.no_grad()
def random_model(shape: ModelShape, device: torch.device) -> nn.Module:
    """Our decoder in bf16, its weights drawn where they lie."""
    with torch.device("meta"):
        model = shape.build().to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    model.tie_weights()
    packs = can_pack(torch.bfloat16, device)  # copies of weights lie as `GeneratorWeights` has them
    for layers in () if packs else model.layers_with_one_input():
        join(layers)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, shape.args.init_std)
    for module in model.modules() if packs else ():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.pack(module.weight)
    return model


class RunnerClock:
    """What our engine's time goes to: its prefills and decoding steps, each to the next's begin.

    On CUDA it is the device's own time, so that nothing waits for the clock.
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
        """("prefill" or "decode", prefixes or sequences, seconds), in order."""
        if self.on_cuda:
            torch.cuda.synchronize()
        times = [t for _, _, t in self.marks]
        pairs = zip(times, times[1:], strict=False)
        took = [a.elapsed_time(b) / 1e3 if self.on_cuda else b - a for a, b in pairs]
        return [(kind, n, t) for (kind, n, _), t in zip(self.marks, took, strict=False)]


class Ours:
    """`Generator`; a wave at a time it shows what continuous batching is worth.

    Args:
        in_waves: nobody starts before all of a wave have ended.
        keeps_rows: besides, who has ended is computed along until then, as in a static batch.
        checks_stop: look for a stop token after each step, as a run does whose responses may end
            early; here none ever does.
    """

    def __init__(
        self,
        model: nn.Module,
        in_waves: bool = False,
        keeps_rows: bool = False,
        cuda_graphs: bool = True,
        max_prefill_tokens: int = 8192,
        checks_stop: bool = False,
    ) -> None:
        never = {model.args.vocab_size}
        self.generator = Generator(model, never, max_prefill_tokens=max_prefill_tokens)
        self.generator.use_cuda_graphs = cuda_graphs
        self.in_waves, self.keeps_rows = in_waves or keeps_rows, keeps_rows
        self.ignore_eos = not checks_stop
        self.intervals: list[tuple[str, int, float]] = []  # of the last call

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        # One limit for all, so that waves and rounds can share one cache.
        params = SamplingParams(max(work.new_tokens), ignore_eos=self.ignore_eos)
        generator, clock = self.generator, RunnerClock(self.generator.device)
        generator.max_concurrent = concurrent
        samples, forwards = [], 0
        start = time.perf_counter()
        with clock.watch():
            for wave in work.waves(concurrent if self.in_waves else len(work.prompts)):
                if self.keeps_rows:
                    wave = Workload(wave.prompts, [max(wave.new_tokens)] * len(wave.prompts))
                samples += generator.generate(self._requests(wave), params)
                forwards += generator.stats.decode_forwards
        self.intervals = clock.intervals()  # waits for the device
        seconds = time.perf_counter() - start
        assert all(torch.isfinite(s.student_logprobs).all() for s in samples)
        details: dict[str, Any] = {"forwards": forwards}
        for phase in ("prefill", "decode"):
            details[f"{phase}_s"] = sum(t for kind, _, t in self.intervals if kind == phase)
        tokens = [
            min(len(s.response_ids), n) for s, n in zip(samples, work.new_tokens, strict=True)
        ]
        return Answer(tokens, seconds, details)

    @staticmethod
    def _requests(work: Workload) -> list[Request]:
        both = zip(work.prompts, work.new_tokens, strict=True)
        return [
            Request(Prompt(i, "", p), 0, sequence_key(0, i), n) for i, (p, n) in enumerate(both)
        ]


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
        """Tokens sampled for every prompt: as many as the longest response takes."""
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
        return out.cpu().shape[1] - longest


class Vllm:
    """vLLM in a process and an environment of its own (`rollout_vllm.py`).

    Args:
        python: an interpreter that imports vllm.
        folder: has a config.json.
        longest: tokens of a sequence at most.
        log: the file that gets what vLLM has to say.
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
        # Its own choice of threads, and its own packages.
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
        del concurrent  # set at its start; where fewer are to run at once, fewer are asked for
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
