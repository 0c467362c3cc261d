"""Record the ranks of response tokens, and the likeliest other tokens, for written rollouts.

Samples with an `inspection`, a dict that is empty at first, are watched where a model's logits are
computed anyway: those of frozen models in scoring, or in the update if it compares whole
distributions; those of the student in the update.

Shapes: R response tokens that a head sees, W watched ones among them, C of a chunk, v the part of
the vocabulary that this rank holds, B blocks of b columns of it, P tensor-parallel ranks, K
likeliest tokens, I tokens among which they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_titan.data.types import Sample, Standing
from opd_titan.distributed.tensor_parallel import concat_ranks
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.kernels.head_plain import row_blocks
from opd_titan.models.logits import VocabHead

# By role, the likeliest tokens that are kept of each place.
ALTERNATIVES = {"teacher": 5}

# Columns of a block, see `_likeliest`.
_BLOCK = 128

# Ranks [W] of the watched tokens, and ids [W, K] and log-probs [W, K] of the likeliest ones.
Columns = tuple[Tensor, Tensor, Tensor]


class Inspector:
    """Record the ranks of the tokens at some rows in one model's distribution, chunk by chunk.

    Rows are spans, so that a chunk's watched logits are views of it.

    Args:
        spans: of the rows that a head sees, in order.
        k: likeliest tokens to note, 0 for none; as many as there are, if fewer.

    Attributes:
        columns: what was seen, once the head has finished.
    """

    columns: Columns

    def __init__(self, spans: Sequence[slice], k: int) -> None:
        self.spans, self.k = spans, k
        self.tp: Axis = ALONE
        # Of each piece of a span: how many tokens lie ahead [W], and the target's and the likeliest
        # tokens' logits and ids [W, K]; of this rank's part of the vocabulary, but for the target.
        self._pieces: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def look(self, chunk: slice, logits_Cv: Tensor, targets_C: Tensor, head: VocabHead) -> None:
        """Look at a chunk's logits, before truncation; one exchange between the ranks."""
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
            ids_WK = ids_WK + head.tp.rank * head.rows
            self._pieces.append((ahead_W, target_W, values_WK, ids_WK))

    def finish(self, logprob_R: Tensor) -> None:
        """Put the chunks together into `columns`; one exchange between the ranks.

        Ranks count from 1, and equally likely tokens share the best of theirs; a rank is 0 where
        the log-prob is not finite. The likeliest tokens come likeliest first.

        Args:
            logprob_R: of all targets that the head saw.
        """
        logprob_W = torch.cat([logprob_R[span] for span in self.spans])
        ahead_W, target_W, values_WK, ids_WK = map(torch.cat, zip(*self._pieces, strict=True))
        # fp64 holds all of them exactly.
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
    """Return the part of a span that lies in a chunk, counted from the chunk's start."""
    return slice(
        max(span.start, chunk.start) - chunk.start, min(span.stop, chunk.stop) - chunk.start
    )


def _count_above(logits_Wv: Tensor, target_W: Tensor) -> Tensor:
    """Return how many logits of each row are larger than its target's."""
    counts = []
    for block in row_blocks(logits_Wv):
        # As floats, because a CPU sums booleans three times slower. Exact up to 2**24.
        above_Wv = torch.empty_like(logits_Wv[block])
        torch.gt(logits_Wv[block], target_W[block, None], out=above_Wv)
        counts.append(above_Wv.sum(dim=1))
    return torch.cat(counts)


def _likeliest(logits_Wv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row and their columns, likeliest first.

    As `topk` does, which is slow on long rows: they are among the columns of the k blocks with the
    largest maxima, and those of no block.
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
    """Return an inspector of the watched samples among those of a head; None if there are none."""
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


def note_standings(samples: Sequence[Sample], role: str, columns: Columns) -> None:
    """Give the watched ones among the samples what was seen of them."""
    watched = [s for s in samples if s.inspection is not None]
    lengths = [len(s.response_ids) for s in watched]
    parts = zip(*(values.cpu().split(lengths) for values in columns), strict=True)
    for sample, part in zip(watched, parts, strict=True):
        assert sample.inspection is not None
        sample.inspection[role] = Standing(*part)
