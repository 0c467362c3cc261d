"""Do the CUDA paths compute what fp32, the CPU and the other paths compute? Checks with limits.

Shapes: T tokens, N rows, D model width, V vocabulary, H query heads, G key/value heads, K head
size.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gpu_training import fed_in, random_samples, random_trainer, sizes
from harness import DEBUG, NO_PAUSES, REPO, Record, open_trainer, words
from setting import Setting, draw_weights, relative_error
from torch import Tensor, nn

from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.head import LossHead, LossRule
from opd_titan.distill.objectives import ObjectiveSettings, sft
from opd_titan.distill.scoring import score
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import uniforms
from opd_titan.models.logits import Distribution, truncate_
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.sampler import SamplingParams, sample, sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.training.self_check import TOLERANCE

SIZE = "0.6B"
HALF = torch.bfloat16  # what CUDA computes in; a CPU rounds alike
# Around the ends of pages of 64 and of 256 tokens; the samples of a prompt share its pages.
LENGTHS = (3, 63, 64, 65, 40, 255, 256, 257, 600, 20)
NEW_TOKENS = (70, 30, 80, 60, 90, 20, 50, 64, 33, 81)
CONCURRENT = 6


# ------------------------------------------------------------------ the engine


def check_engine(s: Setting) -> None:
    """Check rollouts with CUDA graphs and without, twice, and after weights changed in place."""
    trainer = random_trainer(s, SIZE)
    weights = trainer.models.weights
    weights.sync()
    vocab = trainer.setup.sources["student"].args.vocab_size
    requests, params = _requests(vocab, 8 if s.miniature else 1), SamplingParams(max(NEW_TOKENS))
    # Random weights draw nearly evenly, so with these some responses end early.
    eos = set(range(vocab // 200))
    first: dict[bool, list[Sample]] = {}
    for graphs in (False, True):
        generator = Generator(weights.model, eos, CONCURRENT)
        generator.use_cuda_graphs = graphs
        first[graphs] = generator.generate(requests, params)
        start = time.perf_counter()
        again = generator.generate(requests, params)
        found = {
            "graphs": graphs,
            "path": str(generator.path),
            "same_twice": _equal(first[graphs], again) == 1.0,
            "same_as_without": _equal(first[graphs], first[False]),
            "seconds": time.perf_counter() - start,
        }
        captured = generator.use_cuda_graphs or not (graphs and s.on_cuda)
        _check_gap(s, trainer, first[graphs], "engine", found["same_twice"] and captured, **found)
    # Graphs read weights where they are: after a change in place, the new ones.
    with torch.no_grad():
        for parameter in trainer.models.student.parameters():
            parameter.neg_()
    weights.mark_stale()
    weights.sync()
    samples = generator.generate(requests, params)
    changed = _equal(samples, first[True]) < 1.0
    _check_gap(s, trainer, samples, "engine, weights changed in place", changed)
    generator.release()
    s.reset_memory()

    def wait(module: nn.Module, inputs: Any, hidden_ND: Tensor) -> None:
        hidden_ND[0, 0].item()

    # A step that waits for the device cannot be captured: the rollout goes on without graphs.
    weights.model.register_forward_hook(wait)
    samples = Generator(weights.model, eos, CONCURRENT).generate(requests, params)
    _check_gap(s, trainer, samples, "engine, capture fails")


def _requests(vocab: int, shorter: int) -> list[Request]:
    found = []
    for i, (length, new) in enumerate(zip(LENGTHS, NEW_TOKENS, strict=True)):
        ids = torch.randint(vocab, (max(2, length // shorter),)).tolist()
        prompt, new = Prompt(i, "", tuple(ids)), max(2, new // shorter)
        found += [Request(prompt, j, sequence_key(0, i, j), new) for j in range(1 + i % 2)]
    return found


def _equal(found: Sequence[Sample], wanted: Sequence[Sample]) -> float:
    """Return the share of equal responses. Products of other shapes round otherwise."""
    pairs = zip(found, wanted, strict=True)
    return statistics.mean(a.response_ids == b.response_ids for a, b in pairs)


def _check_gap(
    s: Setting, trainer: Any, samples: list[Sample], figure: str, ok: bool = True, **more: Any
) -> None:
    """Emit |log-prob at rollout - log-prob by the packed forward|, and whether it is small."""
    plan = trainer.phases.plan(samples)
    scored = score(trainer.models.student, plan, Distribution(), trainer.world)
    gaps = torch.cat([(sample.student_logprobs - v).abs() for sample, v in scored])
    found = {"tokens": gaps.numel(), "gap_mean": gaps.double().mean().item()}
    found["gap_max"] = gaps.max().item()
    ok = ok and found["gap_max"] <= TOLERANCE[getattr(torch, trainer.job.dtype)]
    s.emit({"figure": figure, **more, **found, **s.peak_memory(), "ok": ok})


def measure_gap(s: Setting, trained: bool) -> None:
    """Measure |log-prob at rollout - log-prob in training|, of random or of trained weights."""
    rollout: Record = {
        "rollout.prompts_per_step": 8 if s.miniature else 32,
        "rollout.group_size": 1 if s.miniature else 4,
        "rollout.max_new_tokens": 24,
    }
    if trained:
        recipe: Record = {"job.config_file": REPO / "train_configs" / "debug.toml"}
        recipe |= {"job.dump_folder": tempfile.mkdtemp(), "data.path": DEBUG / "data"}
        recipe |= {f"{role}.hf_path": DEBUG / role for role in ("student", "teacher")}
        trainer = open_trainer(words(NO_PAUSES | recipe | rollout))
    else:
        rollout |= {} if s.miniature else {"rollout.group_size": 1, "rollout.max_new_tokens": 256}
        trainer = random_trainer(s, SIZE, **{k.replace(".", "__"): v for k, v in rollout.items()})
    trainer.models.weights.sync()
    samples = trainer.phases.rollout(1, next(trainer.setup.loader), trainer.setup.given_response)
    name = "debug student" if trained else "0.6B, random weights"
    _check_gap(s, trainer, samples, "gap", model=name)


# ------------------------------------------------------------------- numerics


@contextmanager
def _padded() -> Iterator[None]:
    """Let packed attention take its other path, which pads sequences."""
    original = PackedAttention._has_packed_kernel
    PackedAttention._has_packed_kernel = staticmethod(lambda q: False)
    try:
        yield
    finally:
        PackedAttention._has_packed_kernel = staticmethod(original)


def check_attention(s: Setting) -> None:
    """Check packed attention and its gradients, in half precision, against fp32."""
    args, sequence = s.shape(SIZE).args, sizes(s)["sequence"]
    lengths = [1, sequence // 2 + 3, sequence - 1, 17]
    qkv = [
        torch.randn(sum(lengths), n, args.head_dim, device=s.device).to(HALF)
        for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)
    ]

    def attend(operands: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in operands]
        out = PackedAttention(lengths, s.device)(*leaves, 0)
        weight = torch.linspace(-1.0, 1.0, out.shape[-1], device=s.device, dtype=out.dtype)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    packed = attend(qkv)
    with _padded():
        exact = attend([x.float() for x in qkv])
    names = ("out", "dq", "dk", "dv")
    errors = {n: relative_error(x, y) for n, x, y in zip(names, packed, exact, strict=True)}
    s.emit({"figure": "packed attention", **errors, "ok": max(errors.values()) < 0.02})


@torch.no_grad()
def check_logprobs(s: Setting) -> None:
    """Check log-probs in half precision, by packed and by padded attention, against fp32."""
    shape = s.shape(SIZE)
    with s.device:
        half = shape.build().to(HALF)
    draw_weights(half, 0, shape.args.init_std)
    samples = random_samples(s, max(sizes(s)["budgets"]) // 2, 1, shape.args.vocab_size)
    lengths = fed_in(samples)
    ids = [(*x.prompt.token_ids, *x.response_ids) for x in samples]
    tokens_T, targets_T = (
        torch.tensor([t for row in part for t in row], device=s.device)
        for part in ([row[:-1] for row in ids], [row[1:] for row in ids])
    )

    def logprobs(model: nn.Module) -> Tensor:
        h_TD = model(tokens_T, PackedAttention(lengths, s.device))
        logits_TV = (h_TD @ model.lm_head.weight.t()).float()
        return logits_TV.log_softmax(dim=1).gather(1, targets_T[:, None])

    packed = logprobs(half)
    with _padded():
        padded, exact = logprobs(half), logprobs(copy.deepcopy(half).float())
    pairs = {
        "packed_to_fp32": (packed, exact),
        "padded_to_fp32": (padded, exact),
        "packed_to_padded": (packed, padded),
    }
    found = {f"{name}_mean": (a - b).abs().mean().item() for name, (a, b) in pairs.items()}
    ok = found["packed_to_fp32_mean"] <= 1.5 * found["padded_to_fp32_mean"] + 1e-4
    s.emit({"figure": "log-probs", **found, "ok": ok})


def check_head(s: Setting) -> None:
    """Check the head's loss, gradients and entropy against autograd in fp32."""
    args, n = s.shape(SIZE).args, 96
    hidden_ND = torch.randn(n, args.dim, device=s.device).to(HALF)
    weight_VD = torch.randn(args.vocab_size, args.dim, device=s.device) * args.init_std
    operands = hidden_ND, weight_VD.to(HALF)
    targets_N = torch.randint(args.vocab_size, (n,), device=s.device)
    leaves = [x.detach().requires_grad_() for x in operands]
    rule = LossRule(sft, ObjectiveSettings(), Distribution())
    positions_N = torch.arange(n, device=s.device)
    head = LossHead(rule, positions_N, targets_N, TokenScores(), scale=1.0 / n)
    loss, stats = head(*leaves)
    found = torch.autograd.grad(loss, leaves)
    exact = [x.detach().float().requires_grad_() for x in operands]
    logprobs_NV = (exact[0] @ exact[1].t()).log_softmax(dim=1)
    wanted = -logprobs_NV.gather(1, targets_N[:, None]).mean()
    grads = torch.autograd.grad(wanted, exact)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=1)
    errors = {
        "loss": abs(loss.item() - wanted.item()) / abs(wanted.item()),
        "hidden": relative_error(found[0], grads[0]),
        "weight": relative_error(found[1], grads[1]),
        "entropy": relative_error(stats.entropy_R, entropy_N.detach()),
    }
    s.emit({"figure": "head", **errors, "ok": max(errors.values()) < 0.01})


@torch.no_grad()  # as in a rollout
def check_sampler(s: Setting) -> None:
    """Check what is drawn, and what top-k and top-p keep, against a CPU."""
    vocab = s.shape(SIZE).args.vocab_size
    generator = torch.Generator().manual_seed(3)
    logits_NV = 4.0 * torch.randn(256, vocab, generator=generator)
    keys_N = torch.randint(-(2**62), 2**62, (256,), generator=generator)
    positions_N = torch.arange(256)
    on_host, on_device = (
        uniforms(keys_N.to(d), positions_N.to(d)) for d in (torch.device("cpu"), s.device)
    )
    wanted, _ = sample(logits_NV, on_host)
    found, found_logprobs = (x.cpu() for x in sample(logits_NV.to(s.device), on_device))
    true = logits_NV.log_softmax(dim=1).gather(1, found[:, None]).squeeze(1)
    figures: Record = {
        "uniforms_equal": torch.equal(on_device.cpu(), on_host),
        "tokens_equal": (found == wanted).double().mean().item(),
        "logprob_error_max": (found_logprobs - true).abs().max().item(),
    }
    # A target near a boundary may give the next token, because sums are ordered differently.
    ok = figures["uniforms_equal"] and figures["tokens_equal"] >= 0.98
    s.emit({"figure": "sampler", **figures, "ok": ok and figures["logprob_error_max"] < 1e-4})
    ties_NV = logits_NV[:32].mul(8).round().div(8)  # ties fall to the lower token id
    for top_k, top_p in ((50, 1.0), (0, 0.9), (50, 0.9)):
        # fp64, because fp32 sums over 152k probabilities can drop a tied token at the threshold.
        wanted_NV = truncate_(ties_NV.double(), top_k, top_p).float()
        on_device_NV = ties_NV.to(s.device)
        found_NV = truncate_(on_device_NV.clone(), top_k, top_p).cpu()
        same = (found_NV == wanted_NV).all(dim=1).double().mean().item()
        timed = s.seconds(lambda x=on_device_NV, k=top_k, p=top_p: truncate_(x.clone(), k, p))
        how = {"top_k": top_k, "top_p": top_p, "rows_equal": same, "ms": 1e3 * timed["median_s"]}
        s.emit({"figure": "truncation", **how, "ok": same >= 0.95})
