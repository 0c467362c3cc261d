"""The data of a step: prompts, and samples, which collect scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
# The roles of the models that score responses.
ScoredBy = Literal["teacher", "reference"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenized.

    Attributes:
        index: number of the row in the source, the same after filtering and shuffling; part of the
            key of every random number drawn for this prompt. With several sets, the rows of all
            sets are numbered in order.
        response: the data set's own response (SFT, offline distillation), or None.
        answer: the gold final answer; None if there is nothing to grade.
        data_set: the name of its set; empty for the only one.
        teacher: the role of the model that scores the responses.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    response: str | None = None
    answer: str | None = None
    data_set: str = ""
    teacher: str = "teacher"


@dataclass
class TokenRanks:
    """Ranks of a response's tokens in a model's distribution, on the CPU.

    Attributes:
        ranks: int64 [tokens], 1 for the most likely token; 0 where the model's numbers are not
            finite.
        ids, logprobs: the K most likely tokens at each position, most likely first: int64 and fp32
            [tokens, K]; K may be 0.
    """

    ranks: Tensor
    ids: Tensor
    logprobs: Tensor


@dataclass
class Sample:
    """One response to one prompt.

    Attributes:
        response_ids: includes the stop token if `finish_reason` is "stop".
        student_logprobs: natural log-probs from the sampling, fp32 [tokens], on the CPU; None if
            the student did not write the response.
        teacher_logprobs, reference_logprobs: as above; None if there is no such model.
        advantages: fp32 [tokens], on the CPU; None before the update.
        teacher_hidden, reference_hidden: [tokens, width], on the device; set between scoring and
            update if the objective needs whole distributions.
        inspection: the ranks by role, for samples that are written to disk. It is complete on the
            rank that updates on the sample.
    """

    prompt: Prompt
    sample_index: int
    response_ids: list[int]
    finish_reason: FinishReason
    student_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    teacher_hidden: Tensor | None = None
    reference_hidden: Tensor | None = None
    inspection: dict[str, TokenRanks] | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt.token_ids) + len(self.response_ids)

    def logprobs_of(self, role: ScoredBy) -> Tensor | None:
        return self.teacher_logprobs if role == "teacher" else self.reference_logprobs

    def set_logprobs(self, role: ScoredBy, logprobs: Tensor) -> None:
        if role == "teacher":
            self.teacher_logprobs = logprobs
        else:
            self.reference_logprobs = logprobs

    def set_hidden(self, role: ScoredBy, hidden: Tensor) -> None:
        if role == "teacher":
            self.teacher_hidden = hidden
        else:
            self.reference_hidden = hidden
