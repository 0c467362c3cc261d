"""The arguments of objectives: sampled tokens of a chunk, and whole distributions on demand.

Shapes: C response tokens of a chunk, v the part of the vocabulary that this rank holds (all of it
without tensor parallelism), K tokens of a support, B = K + 1 buckets: those and one for the rest.

All log-probs are natural, at the sampling temperature; fp32 in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from opd_titan.distributed.tensor_parallel import concat_ranks, locate_rows, sum_ranks
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.kernels import kl_grad

# A tensor wherever the objective needs it, else None: which, is known only when it runs.
MaybeTensor = Any


@dataclass
class TokenScores:
    """What is known of each response token before the update. None: not needed or not there.

    Attributes:
        rollout: log S at the time of sampling [R].
        teacher: log T [R].
        reference: log R [R].
        teacher_hidden: what the teacher's head projects [R, E], where its whole distribution is
            needed; `teacher` then follows from it.
        reference_hidden: the same of the reference.
    """

    rollout: MaybeTensor = None
    teacher: MaybeTensor = None
    reference: MaybeTensor = None
    teacher_hidden: MaybeTensor = None
    reference_hidden: MaybeTensor = None

    def __getitem__(self, chunk: slice) -> TokenScores:
        values = (getattr(self, f.name) for f in fields(self))
        return TokenScores(*(None if v is None else v[chunk] for v in values))


@dataclass
class ModelLogits:
    """One model's logits of a chunk, and what a pass over them found.

    Attributes:
        values_Cv: this rank's part, up to a constant of each row; -inf for tokens that were cut.
        lse_C: the logsumexp of whole rows: values_Cv - lse_C are log-probs.
        kl_C: KL(S||this model); None for the student.
        truncated: some tokens may have been cut.
    """

    values_Cv: Tensor
    lse_C: Tensor
    kl_C: MaybeTensor = None
    truncated: bool = False

    def normalise(self) -> Tensor:
        """Make the values finite log-probs, in place, and return them."""
        self.values_Cv.sub_(self.lse_C[:, None])
        self.lse_C = torch.zeros_like(self.lse_C)
        if self.truncated:  # 0 x -inf is NaN, and a token that was cut adds nothing
            self.values_Cv.clamp_(min=-1e4)
        return self.values_Cv

    def __getitem__(self, some: Tensor) -> ModelLogits:
        """Return a copy of some rows."""
        return ModelLogits(self.values_Cv[some], self.lse_C[some], truncated=self.truncated)


@dataclass
class Rows:
    """One chunk. Tensors over the vocabulary are computed when they are first used.

    Attributes:
        logprob_C: log S of the sampled tokens.
        scores: of the sampled tokens.
        student, teacher, reference: logits over this rank's part of the vocabulary, of those that
            are there.
        entropy_C: of S.
        tp: the ranks that hold the other parts.
        dtype: what derivatives by the logits are multiplied in.
        probs_out: returns where `probs_Cv` is to be put.
    """

    logprob_C: Tensor
    scores: TokenScores
    student: Any = None
    teacher: Any = None
    reference: Any = None
    entropy_C: MaybeTensor = None
    tp: Axis = ALONE
    dtype: torch.dtype = torch.float32
    probs_out: Callable[[], MaybeTensor] = lambda: None

    @functools.cached_property
    def student_Cv(self) -> Tensor:
        """log S."""
        return self.student.normalise()

    @functools.cached_property
    def probs_Cv(self) -> Tensor:
        """S."""
        return torch.exp(self.student_Cv, out=self.probs_out())

    @functools.cached_property
    def teacher_Cv(self) -> MaybeTensor:
        """log T, which objectives may overwrite, where they are done with `teacher`."""
        return None if self.teacher is None else self.teacher.normalise()

    @functools.cached_property
    def reference_Cv(self) -> MaybeTensor:
        """log R, as `teacher_Cv`."""
        return None if self.reference is None else self.reference.normalise()

    @torch.no_grad()
    def kl_gradient(self, other: ModelLogits) -> Tensor:
        """Return the derivative of KL(S||other) by the student's logits [C, v].

        With x = log p - log q: p (x - sum p x). The other's logits are used up.
        """
        mean_C = other.kl_C + self.student.lse_C - other.lse_C
        # Of two such derivatives, only the sum is rounded.
        dtype = self.dtype if self.reference is None else self.student.values_Cv.dtype
        return kl_grad(self.student.values_Cv, other.values_Cv, self.student.lse_C, mean_C, dtype)

    def __getitem__(self, some: Tensor) -> Rows:
        """Return a copy of some rows' distributions, of student and teacher."""
        student, teacher = self.student[some], self.teacher[some]
        return Rows(self.logprob_C[some], self.scores, student, teacher, tp=self.tp)

    def expect(self, probs_Cv: Tensor, values_Cv: Tensor) -> Tensor:
        """The mean [C] of the values under `probs_Cv`, over the whole vocabulary."""
        return self.expect_each((probs_Cv, values_Cv))[0]

    def expect_each(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """`expect` for pairs of probabilities and values, in one exchange between the ranks."""
        # A product of matrices adds up without another tensor of this size.
        means = [torch.bmm(p_Cv[:, None], v_Cv[:, :, None]).view(-1) for p_Cv, v_Cv in pairs]
        return sum_ranks(torch.stack(means), self.tp).unbind()

    def top_k(self, values_Cv: Tensor, k: int) -> Tensor:
        """Token ids [C, K] of the k largest values of each row, over the whole vocabulary."""
        width = values_Cv.shape[1]
        values_CK, ids_CK = values_Cv.topk(min(k, width), dim=1)
        if self.tp.size == 1:
            return ids_CK
        ids_CK = ids_CK + self.tp.rank * width
        # fp64 holds both exactly: one exchange.
        pairs_P2CK = self._stack(torch.stack((values_CK.double(), ids_CK.double())))
        values, ids = pairs_P2CK.permute(1, 2, 0, 3).flatten(2)
        return ids.gather(1, values.topk(min(k, values.shape[1]), dim=1).indices).long()

    def buckets(self, ids_CK: Tensor, *logprobs_Cv: Tensor) -> tuple[Tensor, ...]:
        """Each model's log-probs [C, B] of these tokens and, last, of all others together.

        The others' is summed, not taken as one minus the rest, which rounding would make negative.
        It is -inf where there are no others.
        """
        row_CK, held_CK = self._locate(ids_CK)
        parts = [self._local_buckets(values_Cv, row_CK, held_CK) for values_Cv in logprobs_Cv]
        return self._stack(torch.stack(parts)).logsumexp(dim=0).unbind()

    @staticmethod
    def _local_buckets(values_Cv: Tensor, row_CK: Tensor, held_CK: Tensor) -> Tensor:
        inside_CK = values_Cv.gather(1, row_CK).masked_fill(~held_CK, -torch.inf)
        cut_CK = torch.zeros_like(inside_CK).masked_fill_(held_CK, -torch.inf)
        rest_C = values_Cv.scatter_add(1, row_CK, cut_CK).logsumexp(dim=1)
        return torch.cat((inside_CK, rest_C[:, None]), dim=1)

    def spread_(self, dlogits_CB: Tensor, rest_C: Tensor, ids_CK: Tensor) -> Tensor:
        """A derivative by the logits [C, v], in the place of `probs_Cv`.

        Args:
            dlogits_CB: its values at these tokens and, last, its sum over all others, which falls
                on them as the student's probabilities do.
            rest_C: log S of all others together.
        """
        row_CK, held_CK = self._locate(ids_CK)
        dlogits_CK, dlogits_rest_C1 = dlogits_CB[:, :-1], dlogits_CB[:, -1:]
        # In logs: where the rest is next to nothing, a token's share of it is still a number.
        rest_C1 = rest_C.clamp(min=torch.finfo(rest_C.dtype).min)[:, None]  # not inf - inf
        dlogits_Cv = torch.sub(self.student_Cv, rest_C1, out=self.probs_Cv)
        cut_CK = torch.zeros_like(dlogits_CK).masked_fill_(held_CK, -torch.inf)
        dlogits_Cv.scatter_add_(1, row_CK, cut_CK).exp_().mul_(dlogits_rest_C1)
        return dlogits_Cv.scatter_add_(1, row_CK, dlogits_CK * held_CK)

    def _locate(self, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.student.values_Cv.shape[1]
        return locate_rows(ids_CK, self.tp.rank * rows, rows)

    def _stack(self, values: Tensor) -> Tensor:
        """Every rank's tensor of this shape: [ranks, *shape]."""
        return concat_ranks(values[None], self.tp)
