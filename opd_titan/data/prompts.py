"""Build a run's prompts: rows -> records -> rendered text -> token ids, filtered and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from opd_titan.data.loading import Rows, load_rows
from opd_titan.data.sources import Record, RowError
from opd_titan.data.templates import check_template, render
from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.heartbeat import beat, set_phase
from opd_titan.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_BATCH = 1024
# A text of more characters is measured against the longest token before it is tokenized: what a
# broken row holds, perhaps a whole file, would take gigabytes only to be dropped.
LARGE_TEXT = 100_000
NO_RESPONSE = (
    "no response, which rollout.on_policy_fraction < 1 and sft learn from; use a set that has them"
)


@dataclass
class PromptSet:
    """The prompts that are left, in the source's order, and what became of the other rows.

    num_rows: rows read; num_duplicates and num_too_long: how many of them were dropped and why.
    source: where they came from, for the log. name: empty for the only set.
    """

    source: str
    name: str = ""
    prompts: list[Prompt] = field(default_factory=list)
    num_rows: int = 0
    num_duplicates: int = 0
    num_too_long: int = 0


def build_prompts(
    *,
    dataset: str,
    path: str,
    split: str,
    template: str,
    enable_thinking: bool,
    max_prompt_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    keep_responses: bool,
    max_prompts: int = 0,
    answer_problem: Callable[[str], str] = lambda answer: "",
    section: str = "data",
    first_index: int = 0,
    name: str = "",
    teacher: str = "teacher",
) -> PromptSet:
    """Load, render, tokenize and filter. `Prompt.index` is the row's number in the source.

    keep_responses: keep the data set's own responses, which every prompt then must have; else
        drop them (OpenThoughts3's are gigabytes).
    max_prompts: stop after this many prompts (0: take all).
    answer_problem: what is wrong with a gold answer, if anything; the row is then refused.
    section: the config table that errors name, "data" or "validation".
    first_index: of the source's first row; name, teacher: of each prompt.

    Raises DataError for data that cannot be used, ModelError for a missing chat template.
    """
    set_phase(f"the reading of {section}.path")
    check_template(template, tokenizer)
    with _naming_the_table(section):
        rows = load_rows(dataset, path, split)
        result = PromptSet(rows.source, name)
        how = {"template": template, "tokenizer": tokenizer, "enable_thinking": enable_thinking}
        shortest = None
        largest = max(LARGE_TEXT, max_prompt_tokens * max(map(len, tokenizer.get_vocab())))
        records = _unique(rows, result)
        while batch := list(islice(records, TOKENIZE_BATCH)):
            beat()
            read = [(*entry, _text_of(rows, *entry, how)) for entry in batch]
            kept = [entry for entry in read if len(entry[-1]) <= largest]
            result.num_too_long += len(read) - len(kept)
            tokenized = _tokenize(tokenizer, [text for *_, text in kept])
            for (number, record, text), ids in zip(kept, tokenized, strict=True):
                if not ids:
                    raise rows.error(number, "the prompt has no tokens")
                shortest = min(shortest or len(ids), len(ids))
                if len(ids) > max_prompt_tokens:
                    result.num_too_long += 1
                    continue
                if keep_responses and record.response is None:
                    raise rows.error(number, NO_RESPONSE)
                if record.answer is not None and (problem := answer_problem(record.answer)):
                    raise rows.error(number, problem)
                response = record.response if keep_responses else None
                index = first_index + number
                result.prompts.append(
                    Prompt(index, text, tuple(ids), response, record.answer, name, teacher)
                )
                if len(result.prompts) == max_prompts:
                    return result
    if not result.prompts:
        raise _none_fits(rows, max_prompt_tokens, shortest, largest)
    return result


def _text_of(rows: Rows, number: int, record: Record, how: dict[str, Any]) -> str:
    try:
        return render(record, raw_format=rows.spec.raw_format, **how)
    except RowError as error:
        raise rows.error(number, error) from error


def _none_fits(rows: Rows, limit: int, shortest: int | None, largest: int) -> DataError:
    least = f"the shortest has {shortest} tokens"
    if shortest is None:
        least = f"every text has over {largest} letters"
    return DataError(
        f"data.max_prompt_tokens = {limit} drops every prompt of {rows.source}; {least}"
    )


def response_token_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, eos_id: int
) -> tuple[int, ...]:
    """Tokenize the data set's own response, with the end token after it. Both templates alike.

    The response follows the prompt's tokens as it stands, nothing between them.
    """
    assert prompt.response is not None, "build the prompts with keep_responses"
    ids = _tokenize(tokenizer, [prompt.response])[0]
    return (*ids, eos_id) if ids[-1:] != [eos_id] else tuple(ids)


def given_response(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], limit: int
) -> Sample:
    """The data set's own response in the place of a sampled one, cut at `limit` tokens.

    A model may have several stop tokens; the tokenizer's own ends what people wrote.
    """
    eos_id = tokenizer.eos_token_id
    ids = response_token_ids(prompt, tokenizer, eos_id if eos_id in stop_ids else min(stop_ids))
    return Sample(prompt, 0, list(ids[:limit]), "stop" if len(ids) <= limit else "length")


@contextmanager
def _naming_the_table(section: str) -> Iterator[None]:
    """Whoever reads rows knows only the key that is at fault, not whose key it is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{section}.{error}") from error


def _unique(rows: Rows, result: PromptSet) -> Iterator[tuple[int, Record]]:
    """Yield the records, for a set that repeats its prompts only the first of each; count both."""
    seen: set[bytes] = set()
    for number, record in rows.records():
        result.num_rows += 1
        if rows.spec.deduplicate:
            text = "\n".join(message["content"] for message in record.messages)
            # 16 bytes a prompt instead of its text: there are over a million rows.
            key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            if key in seen:
                result.num_duplicates += 1
                continue
            seen.add(key)
        yield number, record


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids with no special tokens added; verbose=False: long prompts are dropped, not news."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]
