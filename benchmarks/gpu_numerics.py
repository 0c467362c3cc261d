"""Do the CUDA paths compute what the CPU's do? Figures with limits; a failing check hides none.

Shapes: T tokens, N rows, D model width, V vocabulary, H query heads, G key/value heads, K head
size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_phases import recipe, rule
from gpu_setting import Setting, fed_in, relative_error
from torch import Tensor

from opd_titan.distill.head import loss_head
from opd_titan.distill.objectives import ObjectiveSettings, sft
from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import forward_backward
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.tensor_parallel import local
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import uniforms
from opd_titan.models.logits import Distribution, project
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.sampler import SamplingParams, sample
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.self_check import TOLERANCE, probe

Checked = tuple[dict[str, Any], bool]
SIZE = "0.6B"
HALF = torch.bfloat16  # what CUDA computes in; on a CPU it rounds alike


def measure_numerics(s: Setting) -> None:
    checks: dict[str, Callable[[Setting], Checked]] = {
        "attention: packed and padded against fp32": attention,
        "log-probs: packed and padded against fp32": logprobs,
        "head: fp32 logits of half-precision operands": logits,
        "head: gradients against autograd in fp32": head_gradients,
        "sampler: device against CPU": sampler,
        "rollout against update": rollout,
    }
    for name, check in checks.items():
        try:
            figures, good = check(s)
        except Exception as error:  # the other checks still have something to say
            figures, good = {"error": f"{type(error).__name__}: {str(error)[:300]}"}, False
        s.emit({"figure": name, **figures, "ok": good})


@contextlib.contextmanager
def _without_packed_kernel() -> Iterator[None]:
    original = PackedAttention._has_packed_kernel
    PackedAttention._has_packed_kernel = staticmethod(lambda q: False)
    try:
        yield
    finally:
        PackedAttention._has_packed_kernel = staticmethod(original)


def _mixed(s: Setting, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> list[Tensor]:
    """Attention's result and its three gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = PackedAttention(lengths, s.device)(*leaves, 0)
    weight = torch.linspace(-1.0, 1.0, out.shape[-1], device=s.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def attention(s: Setting) -> Checked:
    args = s.shape("student", SIZE).args
    lengths = [1, s.sequence // 2 + 3, s.sequence - 1, 17]
    q, k, v = (
        torch.randn(sum(lengths), n, args.head_dim, device=s.device).to(HALF)
        for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)
    )
    found = _mixed(s, q, k, v, lengths)
    with _without_packed_kernel():
        padded = _mixed(s, q, k, v, lengths)
        exact = _mixed(s, q.float(), k.float(), v.float(), lengths)
    figures: dict[str, Any] = {"packed_kernel": PackedAttention._has_packed_kernel(q)}
    good = True
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        packed_error = relative_error(found[i], exact[i])
        figures |= {f"{name}_packed": packed_error}
        figures |= {f"{name}_padded": relative_error(padded[i], exact[i])}
        good &= packed_error < 0.02
    return figures, good


def _scores(s: Setting, dtype: torch.dtype) -> Tensor:
    shape = s.shape("teacher", SIZE)
    model = s.model(shape, recipe(False), dtype=torch.float32)
    if dtype != torch.float32:  # the same weights, rounded; drawn in fp32 for both
        exact = model
        model = s.model(shape, recipe(False), dtype=dtype)
        for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            local(mine).copy_(local(theirs))
        del exact
    torch.manual_seed(7)
    samples = s.samples(max(s.budgets), 1, shape.args.vocab_size)
    plan = plan_minibatches(samples, 1, max(s.budgets), s.world.dp)
    return torch.cat([values for _, values in score(model, plan, Distribution(), s.world)])


def logprobs(s: Setting) -> Checked:
    packed_N = _scores(s, HALF)
    with _without_packed_kernel():
        padded_N = _scores(s, HALF)
        exact_N = _scores(s, torch.float32)
    errors = {
        "packed_to_fp32": (packed_N - exact_N).abs(),
        "padded_to_fp32": (padded_N - exact_N).abs(),
        "packed_to_padded": (packed_N - padded_N).abs(),
    }
    figures = {f"{k}_mean": v.mean().item() for k, v in errors.items()}
    figures |= {f"{k}_max": v.max().item() for k, v in errors.items()}
    rounding = figures["padded_to_fp32_mean"]
    return figures, figures["packed_to_fp32_mean"] <= 1.5 * rounding + 1e-4


def _head_operands(s: Setting) -> tuple[Tensor, Tensor]:
    args = s.shape("student", SIZE).args
    hidden_ND = torch.randn(96, args.dim, device=s.device).to(HALF)
    weight_VD = torch.randn(args.vocab_size, args.dim, device=s.device) * args.init_std
    return hidden_ND, weight_VD.to(HALF)


def logits(s: Setting) -> Checked:
    hidden_ND, weight_VD = _head_operands(s)
    found_NV = project(hidden_ND, weight_VD)
    error = relative_error(found_NV, hidden_ND.double() @ weight_VD.double().t())
    # A CPU rounds its product to bf16 once: 2^-9 at most. CUDA adds up in fp32, in some order.
    limit = 3e-5 if s.on_cuda else 4e-3
    is_fp32 = found_NV.dtype == torch.float32
    figures = {"relative_error": error, "limit": limit, "fp32": is_fp32}
    return figures, is_fp32 and error < limit


def head_gradients(s: Setting) -> Checked:
    operands = _head_operands(s)
    n = operands[0].shape[0]
    targets_N = torch.randint(operands[1].shape[0], (n,), device=s.device)
    leaves = [x.detach().requires_grad_() for x in operands]
    loss, stats = loss_head(
        *leaves,
        predict_R=torch.arange(n, device=s.device),
        targets_R=targets_N,
        scores=TokenScores(),
        scale=1.0 / n,
        objective=sft,
        settings=ObjectiveSettings(),
        dist=Distribution(),
    )
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


def sampler(s: Setting) -> Checked:
    vocab = s.shape("student", SIZE).args.vocab_size
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randn(256, vocab, generator=generator)
    keys_N = torch.randint(-(2**62), 2**62, (256,), generator=generator)
    positions_N = torch.arange(256)
    on_host = uniforms(keys_N, positions_N)
    on_device = uniforms(keys_N.to(s.device), positions_N.to(s.device))
    wanted, _ = sample(logits_NV, on_host)
    found, found_logprobs = sample(logits_NV.to(s.device), on_device)
    found, found_logprobs = found.cpu(), found_logprobs.cpu()
    true = logits_NV.log_softmax(dim=1).gather(1, found[:, None]).squeeze(1)
    figures = {
        "uniforms_equal": torch.equal(on_device.cpu(), on_host),
        "tokens_equal": (found == wanted).double().mean().item(),
        "logprob_error_max": (found_logprobs - true).abs().max().item(),
    }
    good = figures["uniforms_equal"] and figures["tokens_equal"] >= 0.98
    return figures, good and figures["logprob_error_max"] < 1e-4


def rollout(s: Setting) -> Checked:
    """The preflight's own probe: the student as its own teacher, and rollout against update."""
    shape, config = s.shape("student", SIZE), recipe(False)
    student = s.model(shape, config)
    weights = GeneratorWeights(
        student, lambda: shape.build_share(s.world.tp, False), s.dtype, s.device
    )
    weights.sync()
    generator = Generator(weights.model, {0})
    params = SamplingParams(16, ignore_eos=True)
    prompts = s.prompts(4, shape.args.vocab_size)
    figures = probe(student, generator, prompts, params, 42, s.world)
    limit = TOLERANCE[s.dtype]
    return {**figures, "limit": limit}, abs(figures["kl"]) <= limit and figures["gap"] <= limit


def check_compiled(s: Setting) -> None:
    """One micro-batch's loss and gradient, compiled and not, each against eager fp32."""
    exact_loss, exact = _loss_and_gradient(s, False, torch.float32)
    figures: dict[str, Any] = {}
    for name, compile in (("eager", False), ("compiled", True)):
        loss, gradient = _loss_and_gradient(s, compile, s.dtype)
        figures |= {
            f"{name}_loss_error": abs(loss - exact_loss),
            f"{name}_gradient_error": relative_error(gradient, exact),
        }
    # By itself eager's error may be tiny: bf16 rounds by 4e-3.
    good = all(
        figures[f"compiled_{what}"] <= 1.5 * figures[f"eager_{what}"] + 2e-3
        for what in ("loss_error", "gradient_error")
    )
    s.emit({"figure": "compiled against eager", **figures, "ok": good})


def _loss_and_gradient(s: Setting, compile: bool, dtype: torch.dtype) -> tuple[float, Tensor]:
    shape, config = s.shape("student", SIZE), recipe(compile)
    model = s.model(shape, config, dtype=dtype)
    torch.manual_seed(11)
    samples = s.samples(s.sequence, 2, shape.args.vocab_size)
    tokens = sum(fed_in(samples))
    stats, _ = forward_backward(model, samples, tokens, rule(config), s.world)
    # The first layer's gradient has gone through all of the others.
    first = model.layers[0].attention.wv.weight.grad.to_local()
    return stats.loss_R.mean().item(), first.clone()
