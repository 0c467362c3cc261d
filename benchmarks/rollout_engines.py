"""What `rollout.py` compares: a workload, models with the same weights, and engines to run it.

An engine is called with a workload and the number of sequences that may run at once, and answers
with the tokens it sampled for each prompt and the seconds that took.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from qwen3_shapes import hf_config
from torch import nn

from opd_titan.build import ModelShape, inspect_shape
from opd_titan.checkpoint.hf_load import check_hf_weights, load_hf_weights
from opd_titan.data.types import Prompt, Sample
from opd_titan.models.layers import Linear, can_pack
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.runner import Runner
from opd_titan.rollout.sampler import sequence_key
from opd_titan.rollout.scheduler import Request

# Qwen3 tokens of the first 64 GSM8K training questions as "Question: ...\nAnswer:".
GSM8K_LENGTHS = (
    *(42, 35, 64, 57, 30, 69, 61, 110, 113, 71, 80, 101, 43, 71, 34, 74, 60, 84, 68, 68, 76, 55),
    *(61, 61, 85, 97, 59, 89, 57, 59, 59, 67, 119, 72, 47, 53, 51, 84, 74, 78, 47, 74, 70, 58, 72),
    *(87, 46, 59, 53, 60, 77, 67, 53, 63, 71, 39, 65, 64, 79, 93, 61, 104, 44, 90),
)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}


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


def ragged_lengths(count: int, shortest: int, longest: int) -> list[int]:
    pick = random.Random(0)
    return [pick.randint(shortest, longest) for _ in range(count)]


def nano_workload(count: int, shortest: int, longest: int, vocab: int) -> Workload:
    """nano-vllm's bench.py, draw by draw: its 256 requests ask for 133,966 tokens."""
    pick = random.Random(0)
    prompts = [
        tuple(pick.randint(0, 10000) % vocab for _ in range(pick.randint(shortest, longest)))
        for _ in range(count)
    ]
    return Workload(prompts, [pick.randint(shortest, longest) for _ in range(count)])


# -------------------------------------------------------------------- the models


def model_config(shape: str, vocab: int | None = None) -> dict[str, Any]:
    """The config.json of "small" or of a released size; `vocab` replaces its vocabulary."""
    config = hf_config("0.6B") | SMALL if shape == "small" else hf_config(shape)
    if vocab:
        config |= {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": None}
    return config


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Save random weights in bf16, unless the folder has a model of these sizes.

    Raises:
        ValueError: it has one of other sizes.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if (folder / "config.json").exists():
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key in ("vocab_size", "tie_word_embeddings", *SMALL):
            if found.get(key) != config[key]:
                raise ValueError(f"{folder}: {key} is {found.get(key)}, not {config[key]}")
        return
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config)).to(torch.bfloat16)
    model.save_pretrained(folder)


def _empty_model(shape: ModelShape, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        model = shape.build().to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    model.tie_weights()
    return model


def load_model(folder: Path, device: torch.device) -> nn.Module:
    """Our decoder with a folder's weights, bf16."""
    shape = inspect_shape("student", str(folder), 1)
    family, args = shape.family, shape.args
    model = _empty_model(shape, device)
    key_table = family.hf_to_native(args.n_layers, args.tied)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {hf: shapes[native] for hf, native in key_table.items()}
    files = check_hf_weights(folder, expected, family.tied_hf_keys if args.tied else {})
    load_hf_weights(model, files, key_table)
    _pack(model, device)
    return model


@torch.no_grad()
def random_model(shape: ModelShape, device: torch.device) -> nn.Module:
    """Our decoder with weights drawn where they lie, bf16."""
    model = _empty_model(shape, device)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, shape.args.init_std, generator=generator)
    _pack(model, device)
    return model


def _pack(model: nn.Module, device: torch.device) -> None:
    """Keep the layers' weights as `GeneratorWeights` keeps its copies."""
    if can_pack(torch.bfloat16, device):
        for module in model.modules():
            if isinstance(module, Linear) and module is not model.lm_head:
                module.pack(module.weight)


# ------------------------------------------------------------------- the engines


@dataclass
class Answer:
    """Tokens sampled for each prompt, seconds, and what else an engine has to say."""

    tokens: list[int]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


Engine = Callable[[Workload, int], Answer]


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class RunnerClock:
    """What the engine's time goes to: its prefills and decoding steps, each to the next's begin.

    On CUDA the device's own time, so that nothing waits for the clock.
    """

    device: torch.device
    marks: list[tuple[str, int, Any]] = field(default_factory=list)

    @contextmanager
    def watch(self) -> Iterator[None]:
        prefill, decode = Runner.prefill, Runner.decode

        def marked_prefill(runner: Runner, chunks: Sequence[Any]) -> Any:
            self.marks.append(("prefill", len(chunks), _now(self.device)))
            return prefill(runner, chunks)

        def marked_decode(runner: Runner, n: int) -> Any:
            self.marks.append(("decode", n, _now(self.device)))
            return decode(runner, n)

        Runner.prefill, Runner.decode = marked_prefill, marked_decode
        try:
            yield
        finally:
            Runner.prefill, Runner.decode = prefill, decode
            self.marks.append(("end", 0, _now(self.device)))

    def intervals(self) -> list[tuple[str, int, float]]:
        """("prefill" or "decode", prefixes or sequences, seconds), in order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(kind, n, self._between(t, later)) for (kind, n, t), (_, _, later) in pairs]

    def _between(self, first: Any, second: Any) -> float:
        on_cuda = self.device.type == "cuda"
        return first.elapsed_time(second) / 1e3 if on_cuda else second - first

    def phases(self) -> dict[str, float]:
        found = self.intervals()
        return {f"{p}_s": sum(t for k, _, t in found if k == p) for p in ("prefill", "decode")}


class Ours:
    """`Generator`; a wave at a time it shows what continuous batching is worth.

    Args:
        checks_stop: look for a stop token after each step, as a run does whose responses may end
            early; here none ever does.
    """

    def __init__(
        self,
        model: nn.Module,
        in_waves: bool = False,
        cuda_graphs: bool = True,
        max_prefill_tokens: int = 8192,
        checks_stop: bool = False,
    ) -> None:
        never = {model.args.vocab_size}
        self.generator = Generator(model, never, max_prefill_tokens=max_prefill_tokens)
        self.generator.use_cuda_graphs = cuda_graphs
        self.in_waves, self.ignore_eos = in_waves, not checks_stop
        self.clock = RunnerClock(self.generator.device)  # the last call's

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        # One limit for all, so that waves and rounds can share one cache.
        params = SamplingParams(max(work.new_tokens), ignore_eos=self.ignore_eos)
        self.generator.max_concurrent = concurrent
        self.clock = clock = RunnerClock(self.generator.device)
        samples, forwards, preempted = [], 0, 0
        start = time.perf_counter()
        with clock.watch():
            for wave in work.waves(concurrent if self.in_waves else len(work.prompts)):
                samples += self.generator.generate(self._requests(wave), params)
                forwards += self.generator.stats.decode_forwards
                preempted += self.generator.stats.preempted
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert all(torch.isfinite(s.student_logprobs).all() for s in samples)
        details = {**clock.phases(), "forwards": forwards, "preempted": preempted}
        return Answer([len(s.response_ids) for s in samples], seconds, details)

    @staticmethod
    def _requests(work: Workload) -> list[Request]:
        both = zip(work.prompts, work.new_tokens, strict=True)
        return [
            Request(Prompt(i, "", p), 0, sequence_key(0, i), n) for i, (p, n) in enumerate(both)
        ]


class Generate:
    """`transformers`' generate over left-padded batches. It gives no log-probs: less work."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

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
        longest = max(map(len, work.prompts))
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in work.prompts])
        lengths = torch.tensor([[len(p)] for p in work.prompts])
        mask = (torch.arange(longest) >= longest - lengths).long()
        device = self.model.device
        out = self.model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
        return out.cpu().shape[1] - longest


class Vllm:
    """vLLM in a process and an environment of its own (`rollout_vllm.py`).

    Args:
        python: an interpreter that imports vllm.
        longest: tokens of a sequence at most.
        log: the file that gets what vLLM has to say.
        all_cores: compute on all cores of a CPU; by itself it keeps one for its other processes.

    Raises:
        RuntimeError: it does not start; later, it ended.
    """

    def __init__(
        self,
        python: str,
        folder: Path,
        longest: int,
        concurrent: int,
        log: Path,
        load_format: str = "auto",
        all_cores: bool = False,
    ) -> None:
        self.log = log
        script = Path(__file__).with_name("rollout_vllm.py")
        command = [python, str(script), str(folder), "--load-format", load_format]
        command += ["--max-num-seqs", str(concurrent)]
        command += ["--max-model-len", str(longest + -longest % 256)]
        # Its own choice of threads, and its own packages.
        hidden = ("OMP_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV")
        env = {k: v for k, v in os.environ.items() if k not in hidden}
        if all_cores:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            env["VLLM_CPU_OMP_THREADS_BIND"] = cores
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
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
