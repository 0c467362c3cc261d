"""The vocabulary head in chunks: log-probs, entropy and the loss, forward and backward in one pass.

No tensor of [tokens, vocabulary] ever exists beyond one chunk, and only positions that predict a
response token are projected.

Under tensor parallelism each rank projects onto its part of the vocabulary; the ranks exchange a
few numbers per token, never logits (except where top-k or top-p have to see them all).

Shapes: T packed tokens, R response tokens, C response tokens of a chunk, D model width,
v the part of the vocabulary that this rank holds (all of it without tensor parallelism), P
tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd_titan.distill.objectives import Objective, ObjectiveSettings, TokenScores
from opd_titan.distributed.tensor_parallel import sum_ranks
from opd_titan.models.logits import Distribution, VocabHead, local_logits

# fp32 logits of one chunk. On a CPU larger chunks reach the same matmul speed and only cost memory.
# A GPU rereads the head's fp32 gradient for each chunk, so it wants many rows (by arithmetic: at
# 64 MiB that traffic would be three times the products' own time).
CHUNK_BYTES = {"cpu": 64 * 1024**2, "cuda": 512 * 1024**2}


def _chunks(n: int, head: VocabHead, dist: Distribution) -> list[slice]:
    # Truncation sees the whole vocabulary, sorted: seven such tensors at its peak.
    width = 8 * head.vocab_size if dist.truncates else head.rows
    rows = max(1, CHUNK_BYTES[head.weight_vD.device.type] // (4 * width))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _logits(
    h_CD: Tensor, head: VocabHead, targets_C: Tensor, dist: Distribution, buffer: Tensor | None
) -> Tensor:
    out_Cv = None if buffer is None else buffer[: h_CD.shape[0]]
    return local_logits(h_CD, head, dist, targets_C, out_Cv)


def _buffer(chunks: list[slice], head: VocabHead) -> Tensor:
    """fp32 [C, v] that holds any of the chunks: one allocation serves them all."""
    rows = max((c.stop - c.start for c in chunks), default=0)
    return torch.empty(rows, head.rows, device=head.weight_vD.device)


def _logits_buffer(chunks: list[slice], head: VocabHead) -> Tensor | None:
    """None where the product cannot write fp32 in place: half-precision operands."""
    return _buffer(chunks, head) if head.weight_vD.dtype == torch.float32 else None


@torch.no_grad()
def score_head(
    hidden_TD: Tensor, weight: Tensor, predict_R: Tensor, targets_R: Tensor, dist: Distribution
) -> Tensor:
    """Log-probs [R] fp32 of the targets, without gradients. Give it to the model's forward.

    Args:
        weight: of the head [V, D], as the model's forward has it.
        predict_R: for each target, the packed position whose hidden state predicts it.
        targets_R: token ids.
    """
    head = VocabHead.of(weight)
    out_R = torch.empty(targets_R.numel(), device=hidden_TD.device)
    chunks = _chunks(targets_R.numel(), head, dist)
    buffer = _logits_buffer(chunks, head)
    for chunk in chunks:
        targets_C = targets_R[chunk]
        logits_Cv = _logits(hidden_TD[predict_R[chunk]], head, targets_C, dist, buffer)
        out_R[chunk] = _target_logprobs(logits_Cv, targets_C, head)[0]
    return out_R


def _target_logprobs(
    logits_Cv: Tensor, targets_C: Tensor, head: VocabHead
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets [C] and the normalisers [C] over the whole vocabulary."""
    normaliser_C = logits_Cv.logsumexp(dim=1)
    row_C, held_C = head.locate(targets_C)
    target_C = logits_Cv.gather(1, row_C[:, None]).squeeze(1)
    if head.tp.size > 1:
        target_C = target_C.masked_fill(~held_C, -torch.inf)
        parts_P2C = head.stack(torch.stack((normaliser_C, target_C)))
        normaliser_C = parts_P2C[:, 0].logsumexp(dim=0)
        target_C = parts_P2C[:, 1].amax(dim=0)
    return target_C - normaliser_C, normaliser_C


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
    weight: Tensor,
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
    head = VocabHead.of(weight)
    hidden_RD = hidden_TD.index_select(0, predict_R)
    loss, *stats = _FusedLoss.apply(
        hidden_RD, head.weight_vD, head.tp, targets_R, scores, scale, token_loss, dist
    )
    return loss, HeadStats(*stats)


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients of each chunk while its logits are there.

    With g the derivative of a token's loss by its log-prob, p the probabilities and t the
    temperature, the logits' gradient is g (onehot - p) / t. Forward therefore ends with the
    gradients of hidden states and weight in hand; backward only scales them.

    Under tensor parallelism the hidden states' gradient is this rank's part of a sum over ranks,
    which the backward of the gathering of tokens makes.
    """

    @staticmethod
    def forward(ctx, hidden_RD, weight_vD, tp, targets_R, scores, scale, token_loss, dist):
        head = VocabHead(weight_vD.detach(), tp)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_vD = torch.zeros_like(weight_vD, dtype=torch.float32)
        stats: list[list[Tensor]] = []
        chunks = _chunks(targets_R.numel(), head, dist)
        logits_buffer = _logits_buffer(chunks, head)
        probs_buffer = _buffer(chunks, head)
        for chunk in chunks:
            h_CD, targets_C = hidden_RD[chunk], targets_R[chunk]
            logits_Cv = _logits(h_CD, head, targets_C, dist, logits_buffer)
            logprob_C, normaliser_C = _target_logprobs(logits_Cv, targets_C, head)
            with torch.enable_grad():
                leaf_C = logprob_C.requires_grad_()
                result = token_loss(leaf_C, scores[chunk])
                (g_C,) = torch.autograd.grad(result.loss_C.sum(), leaf_C)
            logprobs_Cv = logits_Cv.sub_(normaliser_C[:, None])
            probs_Cv = torch.exp(logprobs_Cv, out=probs_buffer[: h_CD.shape[0]])
            if dist.truncates:  # 0 x -inf is NaN, and a token that was cut adds nothing
                logprobs_Cv.masked_fill_(logprobs_Cv == -torch.inf, 0.0)
            entropy_C = -torch.bmm(probs_Cv[:, None], logprobs_Cv[:, :, None]).view(-1)
            g_C = g_C * (scale / dist.temperature)
            dlogits_Cv = probs_Cv.mul_(-g_C[:, None])
            row_C, held_C = head.locate(targets_C)
            dlogits_Cv.scatter_add_(1, row_C[:, None], (g_C * held_C)[:, None])
            dlogits_Cv = dlogits_Cv.to(hidden_RD.dtype)
            torch.mm(dlogits_Cv, head.weight_vD, out=grad_hidden_RD[chunk])
            _add_product_(grad_weight_vD, dlogits_Cv, h_CD)
            stats.append(
                [logprob_C.detach(), entropy_C, result.loss_C.detach()]
                + [result.advantage_C, result.ratio_C, result.clipped_C]
            )
        ctx.save_for_backward(grad_hidden_RD, grad_weight_vD.to(weight_vD.dtype))
        logprob_R, entropy_R, loss_R, *rest = (torch.cat(c) for c in zip(*stats, strict=True))
        sum_ranks(entropy_R, tp)  # each rank's was over its part of the vocabulary
        columns = (logprob_R, entropy_R, loss_R, *rest)
        ctx.mark_non_differentiable(*columns)
        return loss_R.sum() * scale, *columns

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = ctx.saved_tensors
        # In place: these are as large as the head, and serve one backward.
        grad_hidden_RD, grad_weight_vD = (grad.mul_(grad_loss) for grad in grads)
        return grad_hidden_RD, grad_weight_vD, None, None, None, None, None, None


def _add_product_(weight_grad_vD: Tensor, dlogits_Cv: Tensor, h_CD: Tensor) -> None:
    """weight_grad += dlogits^T h, accumulated in fp32 whatever the operands are."""
    if dlogits_Cv.dtype == torch.float32:
        weight_grad_vD.addmm_(dlogits_Cv.t(), h_CD)
    elif dlogits_Cv.is_cuda:
        weight_grad_vD.add_(torch.mm(dlogits_Cv.t(), h_CD, out_dtype=torch.float32))
    else:
        weight_grad_vD.add_(torch.mm(dlogits_Cv.t(), h_CD))
