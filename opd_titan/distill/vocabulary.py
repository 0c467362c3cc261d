"""The arguments of objectives: a chunk of response tokens and the models' distributions.

Shapes: C response tokens of a chunk, v the part of the vocabulary that this rank holds (all of it
without tensor parallelism), K tokens of a support, B = K + 1 buckets: those tokens, and one bucket
for all others.

All log-probs are natural, at the sampling temperature; fp32 in training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_titan.distributed.tensor_parallel import sum_ranks
from opd_titan.models import kernels

# A tensor if the objective needs it, else None. Which one is known only at run time.
MaybeTensor = Any


@dataclass
class TokenScores:
    """The scores of each response token before the update. None: not needed or not known.

    Attributes:
        rollout: log S at the time of sampling [R].
        teacher: log T [R].
        reference: log R [R].
        teacher_hidden: the teacher's hidden states [R, E], if its whole distribution is needed;
            `teacher` is then computed from them.
        reference_hidden: the same for the reference.
    """

    rollout: MaybeTensor = None
    teacher: MaybeTensor = None
    reference: MaybeTensor = None
    teacher_hidden: MaybeTensor = None
    reference_hidden: MaybeTensor = None

    def __getitem__(self, chunk: slice) -> TokenScores:
        return TokenScores(*(None if x is None else x[chunk] for x in vars(self).values()))


class Buffer:
    """Memory for one fp32 tensor [C, v] of each chunk in turn, allocated at its first use.

    A large tensor that is allocated for each chunk pays for fresh memory pages each time, which on
    a CPU costs as much as the product that fills it.
    """

    def __init__(self, max_rows: int, width: int, device: torch.device) -> None:
        self.shape, self.device = (max_rows, width), device

    @functools.cached_property
    def _memory(self) -> Tensor:
        return torch.empty(self.shape, device=self.device)

    def rows(self, count: int) -> Tensor:
        """Return a tensor [count, v]. It is valid until the next call."""
        return self._memory[:count]


@dataclass
class ModelLogits:
    """One model's logits of a chunk, which this object owns, and statistics of them.

    `logprobs_Cv` is for reading. A caller that wants to overwrite the tensor takes it with
    `take_logprobs` or `take_logits`; reading it here is an error after that.

    Attributes:
        logits_Cv: this rank's part of each row, up to a constant of the row; -inf for truncated
            tokens. None after it was taken.
        lse_C: logsumexp of the whole rows; logits_Cv - lse_C are log-probs.
        logprob_C: log-probs of the response tokens.
        kl_C: KL(S||this model); None for the student.
        truncated: whether tokens may have been truncated.
        normalised: whether `logits_Cv` are log-probs already.
    """

    logits_Cv: MaybeTensor
    lse_C: Tensor
    logprob_C: Tensor
    kl_C: MaybeTensor = None
    truncated: bool = False
    normalised: bool = False

    @property
    def logprobs_Cv(self) -> Tensor:
        """Log-probs [C, v], finite, for reading. The first use computes them in place."""
        assert self.logits_Cv is not None, "the logits were taken"
        if not self.normalised:
            self._normalise(self.logits_Cv, self.lse_C)
            self.lse_C, self.normalised = torch.zeros_like(self.lse_C), True
        return self.logits_Cv

    def copy_logprobs(self, some_N: Tensor) -> Tensor:
        """Return a copy of some rows' log-probs, [N, v]."""
        return self._normalise(self.logits_Cv[some_N], self.lse_C[some_N])

    def _normalise(self, logits_Cv: Tensor, lse_C: Tensor) -> Tensor:
        logits_Cv.sub_(lse_C[:, None])
        # 0 * -inf is NaN, but a truncated token must add 0.
        return logits_Cv.clamp_(min=-1e4) if self.truncated else logits_Cv

    def take_logits(self) -> Tensor:
        """Return the logits [C, v] for the caller to overwrite."""
        logits_Cv, self.logits_Cv = self.logits_Cv, None
        assert logits_Cv is not None, "the logits were taken before"
        return logits_Cv

    def take_logprobs(self) -> Tensor:
        """Return the log-probs [C, v] for the caller to overwrite."""
        logprobs_Cv = self.logprobs_Cv
        self.logits_Cv = None
        return logprobs_Cv


@dataclass
class Rows:
    """One chunk of response tokens. Tensors over the vocabulary are computed at their first use.

    The tensors are for reading, except tensors that were taken from `ModelLogits`.

    Attributes:
        logprob_C: log S of the response tokens.
        scores: the response tokens' scores by all models.
        student, teacher, reference: the `ModelLogits` of the models whose whole distributions are
            available, else None.
        entropy_C: of S.
        head: the student's head, which knows the part of the vocabulary that this rank holds.
        column_C: the column of each response token in that part, -1 if another rank holds it.
        dtype: the type of gradients with respect to the logits, which are operands of products.
        buffer: memory for one more tensor [C, v].
    """

    logprob_C: Tensor
    scores: TokenScores
    student: Any = None
    teacher: Any = None
    reference: Any = None
    entropy_C: MaybeTensor = None
    head: Any = None
    column_C: MaybeTensor = None
    dtype: torch.dtype = torch.float32
    buffer: Buffer | None = None

    @property
    def student_Cv(self) -> Tensor:
        """log S."""
        return self.student.logprobs_Cv

    @property
    def teacher_Cv(self) -> MaybeTensor:
        """log T; None without the teacher's distribution."""
        return None if self.teacher is None else self.teacher.logprobs_Cv

    @property
    def reference_Cv(self) -> MaybeTensor:
        """log R; None without the reference's distribution."""
        return None if self.reference is None else self.reference.logprobs_Cv

    @functools.cached_property
    def probs_Cv(self) -> Tensor:
        """S."""
        return torch.exp(self.student_Cv, out=self._use_buffer())

    def _use_buffer(self) -> Tensor | None:
        """Return the buffer's tensor [C, v], or None if there is no buffer or it is in use."""
        buffer, self.buffer = self.buffer, None
        return None if buffer is None else buffer.rows(self.logprob_C.numel())

    # ------------------------------------------------ gradients with respect to the logits [C, v]

    @torch.no_grad()
    def logprob_gradient(self, g_C: Tensor) -> Tensor:
        """Return the gradient of sum g log S of the response tokens. Takes the student's logits."""
        lse_C = self.student.lse_C
        return kernels.softmax_grad(
            self.student.take_logits(), lse_C, g_C, self.column_C, self.dtype
        )

    @torch.no_grad()
    def kl_gradient(self, other: ModelLogits) -> Tensor:
        """Return the gradient of KL(S||other). Takes the other model's logits.

        With x = log p - log q it is p (x - sum p x).
        """
        student = self.student
        mean_C = other.kl_C + student.lse_C - other.lse_C
        # The sum of two such gradients is rounded once, after it is computed.
        dtype = self.dtype if self.reference is None else student.logits_Cv.dtype
        return kernels.kl_grad(student.logits_Cv, other.take_logits(), student.lse_C, mean_C, dtype)

    def spread(self, dlogits_CB: Tensor, rest_C: Tensor, ids_CK: Tensor) -> Tensor:
        """Return the gradient [C, v] that results from a gradient with respect to buckets.

        Args:
            dlogits_CB: the gradient of these tokens and, last, its sum over all other tokens, which
                share it in proportion to the student's probabilities.
            rest_C: log S of all other tokens together.
        """
        row_CK, held_CK = self.head.locate(ids_CK)
        dlogits_CK, dlogits_rest_C1 = dlogits_CB[:, :-1], dlogits_CB[:, -1:]
        # In logs, so that a token's share of a tiny rest is still a number. Not inf - inf.
        rest_C1 = rest_C.clamp(min=torch.finfo(rest_C.dtype).min)[:, None]
        dlogits_Cv = torch.sub(self.student_Cv, rest_C1, out=self._use_buffer())
        cut_CK = torch.zeros_like(dlogits_CK).masked_fill_(held_CK, -torch.inf)
        dlogits_Cv.scatter_add_(1, row_CK, cut_CK).exp_().mul_(dlogits_rest_C1)
        return dlogits_Cv.scatter_add_(1, row_CK, dlogits_CK * held_CK)

    # ------------------------------------------------ reductions over the whole vocabulary

    def expect(self, probs_Cv: Tensor, values_Cv: Tensor) -> Tensor:
        """Return the mean [C] of the values under `probs_Cv`."""
        return self.expect_each((probs_Cv, values_Cv))[0]

    def expect_each(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return `expect` of each (probabilities, values), in one exchange between the ranks."""
        # A product of matrices sums without another tensor of this size.
        means = [torch.bmm(p_Cv[:, None], v_Cv[:, :, None]).view(-1) for p_Cv, v_Cv in pairs]
        return sum_ranks(torch.stack(means), self.head.tp).unbind()

    def top_k(self, values_Cv: Tensor, k: int) -> Tensor:
        """Return the token ids [C, K] of the k largest values of each row."""
        values_CK, ids_CK = values_Cv.topk(min(k, self.head.rows), dim=1)
        if self.head.tp.size == 1:
            return ids_CK
        ids_CK = ids_CK + self.head.start
        # fp64 represents values and ids exactly, so one exchange is enough.
        pairs_P2CK = self.head.stack(torch.stack((values_CK.double(), ids_CK.double())))
        values, ids = pairs_P2CK.permute(1, 2, 0, 3).flatten(2)
        return ids.gather(1, values.topk(min(k, values.shape[1]), dim=1).indices).long()

    def buckets(self, ids_CK: Tensor, *logprobs_Cv: Tensor) -> tuple[Tensor, ...]:
        """Return each model's log-probs [C, B] of these tokens and, last, of all other tokens.

        The last one is a sum, because one minus the others could be negative after rounding. It is
        -inf if there are no other tokens.
        """
        row_CK, held_CK = self.head.locate(ids_CK)
        parts = [_local_buckets(values_Cv, row_CK, held_CK) for values_Cv in logprobs_Cv]
        return self.head.stack(torch.stack(parts)).logsumexp(dim=0).unbind()


def _local_buckets(values_Cv: Tensor, row_CK: Tensor, held_CK: Tensor) -> Tensor:
    """Return the log-probs [C, B] of the tokens in this rank's part of the vocabulary."""
    inside_CK = values_Cv.gather(1, row_CK).masked_fill(~held_CK, -torch.inf)
    cut_CK = torch.zeros_like(inside_CK).masked_fill_(held_CK, -torch.inf)
    rest_C = values_Cv.scatter_add(1, row_CK, cut_CK).logsumexp(dim=1)
    return torch.cat((inside_CK, rest_C[:, None]), dim=1)
