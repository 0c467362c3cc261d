"""The vocabulary head in chunks: log-probs, entropy and the loss, forward and backward in one pass.

No tensor of [tokens, vocabulary] ever exists beyond one chunk, and only positions that predict a
response token are projected.

Shapes: T packed tokens, R response tokens, C response tokens of a chunk, D model width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd_titan.distill.objectives import Objective, ObjectiveSettings, TokenScores
from opd_titan.models.logits import Distribution, scaled_logits

# fp32 logits of one chunk. Larger chunks reach the same matmul speed and only cost memory.
CHUNK_BYTES = 64 * 1024**2


def _chunks(n: int, vocab: int) -> list[slice]:
    rows = max(1, CHUNK_BYTES // (4 * vocab))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _logits(
    h_CD: Tensor, w_VD: Tensor, targets_C: Tensor, dist: Distribution, buffer: Tensor | None
) -> Tensor:
    out_CV = None if buffer is None else buffer[: h_CD.shape[0]]
    return scaled_logits(h_CD, w_VD, dist, targets_C, out_CV)


def _buffer(chunks: list[slice], weight_VD: Tensor) -> Tensor:
    """fp32 [C, V] that holds any of the chunks: one allocation serves them all."""
    rows = max((c.stop - c.start for c in chunks), default=0)
    return torch.empty(rows, weight_VD.shape[0], device=weight_VD.device)


def _logits_buffer(chunks: list[slice], weight_VD: Tensor) -> Tensor | None:
    """None where the product cannot write fp32 in place: half-precision operands."""
    return _buffer(chunks, weight_VD) if weight_VD.dtype == torch.float32 else None


@torch.no_grad()
def score_head(
    hidden_TD: Tensor, weight_VD: Tensor, predict_R: Tensor, targets_R: Tensor, dist: Distribution
) -> Tensor:
    """Log-probs [R] fp32 of the targets, without gradients. Give it to the model's forward.

    Args:
        predict_R: for each target, the packed position whose hidden state predicts it.
        targets_R: token ids.
    """
    out_R = torch.empty(targets_R.numel(), device=hidden_TD.device)
    chunks = _chunks(targets_R.numel(), weight_VD.shape[0])
    buffer = _logits_buffer(chunks, weight_VD)
    for chunk in chunks:
        targets_C = targets_R[chunk]
        logits_CV = _logits(hidden_TD[predict_R[chunk]], weight_VD, targets_C, dist, buffer)
        out_R[chunk] = _target_logprobs(logits_CV, targets_C)[0]
    return out_R


def _target_logprobs(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets [C] and the normalisers [C, 1]."""
    normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
    return (logits_CV.gather(1, targets_C[:, None]) - normaliser_C1).squeeze(1), normaliser_C1


@dataclass
class HeadStats:
    """Per-token diagnostics [R] of an update, detached."""

    logprob_R: Tensor
    entropy_R: Tensor
    loss_R: Tensor
    advantage_R: Tensor
    ratio_R: Tensor
    clipped_R: Tensor


def loss_head(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    *,
    predict_R: Tensor,
    targets_R: Tensor,
    scores: TokenScores,
    scale: float,
    objective: Objective,
    settings: ObjectiveSettings,
    dist: Distribution,
) -> tuple[Tensor, HeadStats]:
    """The objective summed over response tokens, times `scale`, with its diagnostics.

    `scale` is one over the *global* number of response tokens of the update, so that adding up
    micro-batches and ranks gives the mean over tokens and never a mean of means.
    """
    token_loss = partial(objective, settings=settings)
    loss, *stats = _FusedLoss.apply(
        hidden_TD.index_select(0, predict_R), weight_VD, targets_R, scores, scale, token_loss, dist
    )
    return loss, HeadStats(*stats)


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients of each chunk while its logits are there.

    With g the derivative of a token's loss by its log-prob, p the probabilities and t the
    temperature, the logits' gradient is g (onehot - p) / t. Forward therefore ends with the
    gradients of hidden states and weight in hand; backward only scales them.
    """

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, scores, scale, token_loss, dist):
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        stats: list[list[Tensor]] = []
        chunks = _chunks(targets_R.numel(), weight_VD.shape[0])
        logits_buffer = _logits_buffer(chunks, weight_VD)
        probs_buffer = _buffer(chunks, weight_VD)
        for chunk in chunks:
            h_CD, targets_C = hidden_RD[chunk], targets_R[chunk]
            logits_CV = _logits(h_CD, weight_VD, targets_C, dist, logits_buffer)
            logprob_C, normaliser_C1 = _target_logprobs(logits_CV, targets_C)
            with torch.enable_grad():
                leaf_C = logprob_C.requires_grad_()
                result = token_loss(leaf_C, scores[chunk])
                (g_C,) = torch.autograd.grad(result.loss_C.sum(), leaf_C)
            logprobs_CV = logits_CV.sub_(normaliser_C1)
            probs_CV = torch.exp(logprobs_CV, out=probs_buffer[: h_CD.shape[0]])
            if dist.truncates:  # 0 x -inf is NaN, and a token that was cut adds nothing
                logprobs_CV.masked_fill_(logprobs_CV == -torch.inf, 0.0)
            entropy_C = -torch.bmm(probs_CV[:, None], logprobs_CV[:, :, None]).view(-1)
            g_C = g_C * (scale / dist.temperature)
            dlogits_CV = probs_CV.mul_(-g_C[:, None])
            dlogits_CV.scatter_add_(1, targets_C[:, None], g_C[:, None])
            dlogits_CV = dlogits_CV.to(hidden_RD.dtype)
            torch.mm(dlogits_CV, weight_VD, out=grad_hidden_RD[chunk])
            _add_product_(grad_weight_VD, dlogits_CV, h_CD)
            stats.append(
                [logprob_C.detach(), entropy_C, result.loss_C.detach()]
                + [result.advantage_C, result.ratio_C, result.clipped_C]
            )
        ctx.save_for_backward(grad_hidden_RD, grad_weight_VD.to(weight_VD.dtype))
        columns = [torch.cat(column) for column in zip(*stats, strict=True)]
        ctx.mark_non_differentiable(*columns)
        return columns[2].sum() * scale, *columns

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_hidden_RD, grad_weight_VD = ctx.saved_tensors
        if grad_loss != 1.0:
            grad_hidden_RD, grad_weight_VD = grad_hidden_RD * grad_loss, grad_weight_VD * grad_loss
        return grad_hidden_RD, grad_weight_VD, None, None, None, None, None


def _add_product_(weight_grad_VD: Tensor, dlogits_CV: Tensor, h_CD: Tensor) -> None:
    """weight_grad += dlogits^T h, accumulated in fp32 whatever the operands are."""
    if dlogits_CV.dtype == torch.float32:
        weight_grad_VD.addmm_(dlogits_CV.t(), h_CD)
    elif dlogits_CV.is_cuda:
        weight_grad_VD.add_(torch.mm(dlogits_CV.t(), h_CD, out_dtype=torch.float32))
    else:
        weight_grad_VD.add_(torch.mm(dlogits_CV.t(), h_CD))
