"""Do the CUDA paths compute what fp32 and the CPU do? Checks with limits.

Shapes: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from gpu_setting import Setting, relative_error
from gpu_update import recipe
from harness import Record
from torch import Tensor

from opd_titan.distill.head import LossHead, LossRule
from opd_titan.distill.objectives import ObjectiveSettings, sft
from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.tensor_parallel import local
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import uniforms
from opd_titan.models.logits import Distribution
from opd_titan.rollout.sampler import sample

SIZE = "0.6B"
HALF = torch.bfloat16  # what CUDA computes in; a CPU rounds alike


def measure_numerics(s: Setting) -> None:
    checks = {
        "attention: packed and padded against fp32": attention,
        "log-probs: packed and padded against fp32": logprobs,
        "head: gradients against autograd in fp32": head_gradients,
        "sampler: device against CPU": sampler,
    }
    for name, check in checks.items():
        try:
            figures, good = check(s)
        except Exception as error:  # the other checks are still worth having
            figures, good = {"why": f"{type(error).__name__}: {str(error)[:300]}"}, False
        s.emit({"figure": name, **figures, "ok": good})


@contextlib.contextmanager
def _without_packed_kernel() -> Iterator[None]:
    original = PackedAttention._has_packed_kernel
    PackedAttention._has_packed_kernel = staticmethod(lambda q: False)
    try:
        yield
    finally:
        PackedAttention._has_packed_kernel = staticmethod(original)


def _mixed(s: Setting, qkv: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Return attention's result and its three gradients."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = PackedAttention(lengths, s.device)(*leaves, 0)
    weight = torch.linspace(-1.0, 1.0, out.shape[-1], device=s.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def attention(s: Setting) -> tuple[Record, bool]:
    args = s.shape("student", SIZE).args
    lengths = [1, s.sequence // 2 + 3, s.sequence - 1, 17]
    qkv = [
        torch.randn(sum(lengths), n, args.head_dim, device=s.device).to(HALF)
        for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)
    ]
    packed = _mixed(s, qkv, lengths)
    with _without_packed_kernel():
        padded = _mixed(s, qkv, lengths)
        exact = _mixed(s, [x.float() for x in qkv], lengths)
    errors = {}
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        errors[f"{name}_packed"] = relative_error(packed[i], exact[i])
        errors[f"{name}_padded"] = relative_error(padded[i], exact[i])
    return errors, all(v < 0.02 for k, v in errors.items() if k.endswith("packed"))


def _scores(s: Setting, dtype: torch.dtype) -> Tensor:
    """Return the log-probs of samples under weights that were drawn in fp32, then rounded."""
    shape = s.shape("teacher", SIZE)
    exact = s.model(shape, recipe(), dtype=torch.float32)
    model = s.model(shape, recipe(), dtype=dtype)
    for mine, drawn in zip(model.parameters(), exact.parameters(), strict=True):
        local(mine).copy_(local(drawn))
    torch.manual_seed(7)
    samples = s.samples(max(s.budgets), 1, shape.args.vocab_size)
    plan = plan_minibatches(samples, 1, max(s.budgets), s.world.dp)
    return torch.cat([values for _, values in score(model, plan, Distribution(), s.world)])


def logprobs(s: Setting) -> tuple[Record, bool]:
    packed_N = _scores(s, HALF)
    with _without_packed_kernel():
        padded_N, exact_N = _scores(s, HALF), _scores(s, torch.float32)
    errors = {
        "packed_to_fp32": (packed_N - exact_N).abs(),
        "padded_to_fp32": (padded_N - exact_N).abs(),
        "packed_to_padded": (packed_N - padded_N).abs(),
    }
    figures = {f"{k}_mean": v.mean().item() for k, v in errors.items()}
    figures |= {f"{k}_max": v.max().item() for k, v in errors.items()}
    rounding = figures["padded_to_fp32_mean"]
    return figures, figures["packed_to_fp32_mean"] <= 1.5 * rounding + 1e-4


def head_gradients(s: Setting) -> tuple[Record, bool]:
    args, n = s.shape("student", SIZE).args, 96
    hidden_ND = torch.randn(n, args.dim, device=s.device).to(HALF)
    weight_VD = torch.randn(args.vocab_size, args.dim, device=s.device) * args.init_std
    operands = hidden_ND, weight_VD.to(HALF)
    targets_N = torch.randint(args.vocab_size, (n,), device=s.device)
    leaves = [x.detach().requires_grad_() for x in operands]
    head = LossHead(
        LossRule(sft, ObjectiveSettings(), Distribution()),
        torch.arange(n, device=s.device),
        targets_N,
        TokenScores(),
        scale=1.0 / n,
    )
    loss, stats = head(*leaves)
    found = torch.autograd.grad(loss, leaves)
    exact = [x.detach().float().requires_grad_() for x in operands]
    logprobs_NV = (exact[0] @ exact[1].t()).log_softmax(dim=1)
    wanted = -logprobs_NV.gather(1, targets_N[:, None]).mean()
    grads = torch.autograd.grad(wanted, exact)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=1)
    figures = {
        "loss": abs(loss.item() - wanted.item()) / abs(wanted.item()),
        "hidden": relative_error(found[0], grads[0]),
        "weight": relative_error(found[1], grads[1]),
        "entropy": relative_error(stats.entropy_R, entropy_N.detach()),
    }
    return figures, max(figures.values()) < 0.01


def sampler(s: Setting) -> tuple[Record, bool]:
    vocab = s.shape("student", SIZE).args.vocab_size
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randn(256, vocab, generator=generator)
    keys_N = torch.randint(-(2**62), 2**62, (256,), generator=generator)
    positions_N = torch.arange(256)
    on_host = uniforms(keys_N, positions_N)
    on_device = uniforms(keys_N.to(s.device), positions_N.to(s.device))
    wanted, _ = sample(logits_NV, on_host)
    found, found_logprobs = (x.cpu() for x in sample(logits_NV.to(s.device), on_device))
    true = logits_NV.log_softmax(dim=1).gather(1, found[:, None]).squeeze(1)
    figures = {
        "uniforms_equal": torch.equal(on_device.cpu(), on_host),
        "tokens_equal": (found == wanted).double().mean().item(),
        "logprob_error_max": (found_logprobs - true).abs().max().item(),
    }
    good = figures["uniforms_equal"] and figures["tokens_equal"] >= 0.98
    return figures, good and figures["logprob_error_max"] < 1e-4
