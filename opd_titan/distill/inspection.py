"""Record the ranks of response tokens, and the likeliest other tokens, for written rollouts.

Samples with an `inspection`, a dict that is empty at first, are watched when a model's logits are
computed: the student's in the update, a frozen model's in scoring, or in the update if the
objective compares whole distributions.

Shapes: R response tokens of a head, W watched tokens among them, C tokens of a chunk, v the part of
the vocabulary that this rank holds, B blocks of b columns of it, P tensor-parallel ranks, K
likeliest tokens, I candidates for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_titan.data.types import Sample, TokenRanks
from opd_titan.distributed.tensor_parallel import concat_ranks
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.kernels.head_plain import row_blocks
from opd_titan.models.logits import VocabHead

# By role, how many of the likeliest tokens are recorded at each position.
ALTERNATIVES = {"teacher": 5}

# Columns of a block; see `_likeliest`.
_BLOCK = 128

# Ranks [W] of the watched tokens, and ids [W, K] and log-probs [W, K] of the likeliest ones.
Columns = tuple[Tensor, Tensor, Tensor]


class Inspector:
    """Record the ranks of the tokens at some rows in one model's distribution, chunk by chunk.

    Args:
        spans: the watched rows, in order. Watched logits are views of a chunk, not copies.
        k: how many of the likeliest tokens to record; at most the whole vocabulary.

    Attributes:
        columns: the result; set by `finish`.
    """

    columns: Columns

    def __init__(self, spans: Sequence[slice], k: int) -> None:
        self.spans, self.k = spans, k
        self.tp: Axis = ALONE
        # For each piece of a span: the number of likelier tokens [W], the target's logit [W], and
        # the likeliest tokens' logits and ids [W, K]. All but the target's logit are of this rank's
        # part of the vocabulary.
        self._pieces: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def look(self, chunk: slice, logits_Cv: Tensor, targets_C: Tensor, head: VocabHead) -> None:
        """Record a chunk's logits before truncation, with one exchange between the ranks."""
        places = [_inside(span, chunk) for span in self.spans]
        places = [place for place in places if place.start < place.stop]
        if not places:
            return
        self.tp = head.tp
        row_C, held_C = head.locate(targets_C)
        target_C = logits_Cv.gather(1, row_C[:, None]).squeeze(1)
        target_C = head.stack(target_C.masked_fill(~held_C, -torch.inf)).amax(dim=0)
        for place in places:
            logits_Wv, target_W = logits_Cv[place], target_C[place]
            ahead_W = _count_above(logits_Wv, target_W)
            values_WK, ids_WK = _likeliest(logits_Wv, min(self.k, head.rows))
            ids_WK = ids_WK + head.start
            self._pieces.append((ahead_W, target_W, values_WK, ids_WK))

    def finish(self, logprob_R: Tensor) -> None:
        """Set `columns` from all chunks, with one exchange between the ranks.

        Ranks count from 1. Equally likely tokens all have the best of their ranks. The rank is 0 if
        the log-prob is not finite. The likeliest tokens are in descending order.

        Args:
            logprob_R: the log-probs of all targets of the head.
        """
        logprob_W = torch.cat([logprob_R[span] for span in self.spans])
        ahead_W, target_W, values_WK, ids_WK = map(torch.cat, zip(*self._pieces, strict=True))
        # fp64 represents all of these values exactly.
        own = torch.cat((ahead_W[:, None].double(), values_WK.double(), ids_WK.double()), dim=1)
        parts = concat_ranks(own[None], self.tp)
        ahead_PW1, values_PWK, ids_PWK = parts.split([1, *[values_WK.shape[1]] * 2], dim=2)
        rank_W = 1 + ahead_PW1.sum(dim=(0, 2)).long()
        values, ids = (x.transpose(0, 1).flatten(1) for x in (values_PWK, ids_PWK))
        values_WK, best_WK = values.topk(min(self.k, values.shape[1]), dim=1)
        above_WK = values_WK.float() - target_W[:, None]
        self.columns = (
            rank_W.masked_fill(~logprob_W.isfinite(), 0),
            ids.gather(1, best_WK).long(),
            logprob_W[:, None] + above_WK,
        )


def _inside(span: slice, chunk: slice) -> slice:
    """Return the part of a span that is in a chunk, relative to the chunk's start."""
    return slice(
        max(span.start, chunk.start) - chunk.start, min(span.stop, chunk.stop) - chunk.start
    )


def _count_above(logits_Wv: Tensor, target_W: Tensor) -> Tensor:
    """Return how many logits of each row are larger than its target's."""
    counts = []
    for block in row_blocks(logits_Wv):
        # As floats, because a CPU sums booleans three times slower. They are exact up to 2**24.
        above_Wv = torch.empty_like(logits_Wv[block])
        torch.gt(logits_Wv[block], target_W[block, None], out=above_Wv)
        counts.append(above_Wv.sum(dim=1))
    return torch.cat(counts)


def _likeliest(logits_Wv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row and their columns, in descending order.

    `topk` is slow on long rows. The result is among the columns of the k blocks with the largest
    maxima and the columns after the last whole block.
    """
    blocks = logits_Wv.shape[1] // _BLOCK
    if k >= blocks or k == 0:
        return logits_Wv.topk(k, dim=1)
    blocks_WBb = logits_Wv[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    best_WK = blocks_WBb.amax(dim=2).topk(k, dim=1).indices
    ids_WKb = best_WK[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=best_WK.device)
    rest = torch.arange(blocks * _BLOCK, logits_Wv.shape[1], device=best_WK.device)
    ids_WI = torch.cat((ids_WKb.flatten(1), rest.expand(len(best_WK), -1)), dim=1)
    values_WK, place_WK = logits_Wv.gather(1, ids_WI).topk(k, dim=1)
    return values_WK, ids_WI.gather(1, place_WK)


def watch_samples(samples: Sequence[Sample], role: str) -> Inspector | None:
    """Return an inspector of the watched samples of a head, or None if no sample is watched."""
    spans: list[slice] = []
    start = 0
    for sample in samples:
        stop = start + len(sample.response_ids)
        if sample.inspection is not None:
            if spans and spans[-1].stop == start:
                spans[-1] = slice(spans[-1].start, stop)
            else:
                spans.append(slice(start, stop))
        start = stop
    return Inspector(spans, ALTERNATIVES.get(role, 0)) if spans else None


def record_ranks(samples: Sequence[Sample], role: str, columns: Columns) -> None:
    """Write the columns of an inspector into the watched samples."""
    watched = [s for s in samples if s.inspection is not None]
    lengths = [len(s.response_ids) for s in watched]
    parts = zip(*(values.cpu().split(lengths) for values in columns), strict=True)
    for sample, part in zip(watched, parts, strict=True):
        assert sample.inspection is not None
        sample.inspection[role] = TokenRanks(*part)
