"""What flows through the program: a `Prompt` goes in, `Sample`s come out and gather scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenized.

    index: row in the source, stable under filtering and shuffling; part of the key of every
        random number drawn for this prompt. Of several sets: in these laid end to end.
    response: the data set's own answer text (SFT, offline distillation), None where it has none.
    answer: the gold final answer, None when there is nothing to grade.
    data_set: the name of the set that it is of; empty for the only one.
    teacher: among the job's models, who scores the responses.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    response: str | None = None
    answer: str | None = None
    data_set: str = ""
    teacher: str = "teacher"


@dataclass
class Standing:
    """Where a response's tokens stand in a model's distribution, on the CPU.

    Attributes:
        ranks: int64 [its tokens], from 1, the likeliest; 0 where the model's numbers are not
            finite.
        ids, logprobs: of the K likeliest tokens at each place, likeliest first: int64 and fp32
            [its tokens, K]; K may be 0.
    """

    ranks: Tensor
    ids: Tensor
    logprobs: Tensor


@dataclass
class Sample:
    """One response to one prompt.

    `response_ids` includes the stop token when `finish_reason` is "stop". The other tensors are
    fp32, on the CPU, one natural logarithm (or advantage) per response token; None where that
    model is not there. `student_logprobs` are those of the sampling itself.

    `inspection` is there for samples that are written down: by role, where the tokens stand. On the
    rank that updates on a sample it is complete.

    `teacher_hidden` and `reference_hidden` [its tokens, their width] are there between scoring and
    update where whole distributions are needed, on the device.
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
    inspection: dict[str, Standing] | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt.token_ids) + len(self.response_ids)
