"""Build the prompts of a job: rows -> records -> rendered texts -> token ids."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from opd_titan.data.cache import Prompts, TokenizedRow, Write, cached_prompts
from opd_titan.data.loading import Rows, load_rows, row_error
from opd_titan.data.sources import DatasetSpec, Record, RowError
from opd_titan.data.templates import check_template, render
from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.heartbeat import set_phase
from opd_titan.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_BATCH = 1024
# A text with more characters is dropped without tokenizing it if it would exceed the limit even
# with the longest tokens. A broken row may contain a whole file, which would take gigabytes.
LARGE_TEXT = 100_000
NO_RESPONSE = (
    "no response, but rollout.on_policy_fraction < 1 and sft need one; use a set with responses"
)


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are kept, in the order of the source, and the numbers of dropped rows.

    Attributes:
        source: where they come from, for messages.
        name: the name of the set; empty for the only set.
        num_rows: number of rows read.
        end: one more than the index of the last row; larger than num_rows for a slice of a split.
        num_duplicates, num_too_long: number of rows that were dropped for this reason.
    """

    source: str
    name: str
    prompts: Prompts
    num_rows: int
    end: int
    num_duplicates: int
    num_too_long: int


@dataclass(frozen=True)
class _Settings:
    """The arguments of `build_prompts` that determine the prompts made from the rows."""

    template: str
    enable_thinking: bool
    max_prompt_tokens: int
    keep_responses: bool
    max_prompts: int


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
    answer_problem: Callable[[str], str] | None = None,
    section: str = "data",
    first_index: int = 0,
    name: str = "",
    teacher: str = "teacher",
) -> PromptSet:
    """Load, render, tokenize and filter rows, or take the result of an earlier start from a cache.

    `Prompt.index` is the number of the row in the source.

    Args:
        keep_responses: keep the data set's own responses; every prompt must then have one. False:
            drop them (OpenThoughts3's take gigabytes).
        max_prompts: stop after this many prompts (0: take all).
        answer_problem: returns the problem with an answer, or "".
        section: the config table that errors name, "data" or "validation".
        first_index: index of the source's first row.
        name, teacher: the `data_set` and `teacher` of each prompt.

    Raises:
        DataError: the data cannot be used.
        ModelError: the tokenizer has no chat template, or one that fails.
    """
    set_phase(f"the reading of {section}.path")
    check_template(template, tokenizer)
    settings = _Settings(template, enable_thinking, max_prompt_tokens, keep_responses, max_prompts)
    try:
        rows = load_rows(dataset, path, split)
        version = rows.fingerprint()
        key = _cache_key(rows.spec, version, rows.bounds, settings, tokenizer)

        def make(write: Write) -> dict[str, int]:
            counts = _make(rows, tokenizer, settings, write)
            if rows.fingerprint() != version:
                raise DataError(f"path: {rows.where} changed while it was read; start again")
            return counts

        prompts = cached_prompts(key, make)
        if answer_problem is not None:
            _check_answers(rows, prompts, answer_problem)
    except DataError as error:  # the message begins with a key of the table
        raise DataError(f"{section}.{error}") from error
    if not prompts:
        raise _none_fits(rows.source, max_prompt_tokens, prompts.info["shortest"])
    prompts.first_index, prompts.data_set, prompts.teacher = first_index, name, teacher
    info, end = prompts.info, first_index + prompts.info["end"]
    counts = info["num_rows"], end, info["num_duplicates"], info["num_too_long"]
    return PromptSet(rows.source, name, prompts, *counts)


def _check_answers(rows: Rows, prompts: Prompts, answer_problem: Callable[[str], str]) -> None:
    for prompt in prompts:
        problem = "" if prompt.answer is None else answer_problem(prompt.answer)
        if problem:
            raise row_error(rows.place(prompt.index), problem)


def _cache_key(
    spec: DatasetSpec,
    version: str,
    bounds: tuple[str, str],
    settings: _Settings,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Return a hash of everything that determines the prompts that `_make` writes."""
    import tokenizers
    import transformers

    # The code of this folder and of the data set's function, which may be the user's own.
    code = [*sorted(Path(__file__).parent.glob("*.py")), Path(inspect.getfile(spec.to_record))]
    parts = [
        *(file.read_bytes() for file in code if file.is_file()),
        spec.to_record.__code__.co_code,
        [getattr(spec, field.name) for field in fields(spec) if field.name != "to_record"],
        version,
        bounds,
        settings,
        _model_digest(tokenizer),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizers.__version__,
        transformers.__version__,
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=4)
def _model_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and the rules. Serializing them takes about a second."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a call of the tokenizer sets the same
    backend.no_padding()
    return hashlib.blake2b(backend.to_str().encode(), digest_size=16).hexdigest()


def _make(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: _Settings, write: Write
) -> dict[str, int]:
    """Write the prompts in batches. Return the counts of a PromptSet and the shortest length."""
    counts = {"num_rows": 0, "end": 0, "num_duplicates": 0, "num_too_long": 0}
    limit, left = settings.max_prompt_tokens, settings.max_prompts or sys.maxsize
    most_text = max(LARGE_TEXT, limit * max(map(len, tokenizer.get_vocab())))
    shortest = sys.maxsize
    rendered = _rendered(rows, tokenizer, settings, counts)
    while left and (batch := list(islice(rendered, TOKENIZE_BATCH))):
        small = [row for row in batch if len(row[-1]) <= most_text]
        tokenized = _tokenize(tokenizer, [text for *_, text in small])
        shortest = min([shortest, *map(len, tokenized)])
        fits = [(*row, ids) for row, ids in zip(small, tokenized, strict=True) if len(ids) <= limit]
        counts["num_too_long"] += len(batch) - len(fits)
        found = []
        for number, place, record, text, ids in fits[:left]:
            if not ids:
                raise row_error(place, "the prompt has no tokens")
            if settings.keep_responses and record.response is None:
                raise row_error(place, NO_RESPONSE)
            response = record.response if settings.keep_responses else None
            found.append(TokenizedRow(number, text, ids, response, record.answer))
        left -= len(found)
        write(found)
    return {**counts, "shortest": shortest}


def _rendered(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: _Settings, counts: dict[str, int]
) -> Iterator[tuple[int, str, Record, str]]:
    """Yield number, place, record and text of each row except duplicates. Update `counts`."""
    seen: set[bytes] = set()
    for number, place, record in rows.records():
        counts["num_rows"] += 1
        counts["end"] = number + 1
        if rows.spec.deduplicate:
            question = " ".join(" ".join(m["content"] for m in record.messages).split())
            # 16 bytes per prompt instead of its text, because there are over a million rows.
            key = hashlib.blake2b(question.encode(), digest_size=16).digest()
            if key in seen:
                counts["num_duplicates"] += 1
                continue
            seen.add(key)
        try:
            text = render(
                record,
                template=settings.template,
                raw_format=rows.spec.raw_format,
                tokenizer=tokenizer,
                enable_thinking=settings.enable_thinking,
            )
        except RowError as error:
            raise row_error(place, error) from error
        yield number, place, record, text


def _none_fits(source: str, limit: int, shortest: int) -> DataError:
    least = f"the shortest has {shortest} tokens"
    if shortest == sys.maxsize:
        least = f"every text has over {LARGE_TEXT:,} characters"
    return DataError(f"data.max_prompt_tokens = {limit} drops every prompt of {source}; {least}")


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return token ids, without added special tokens."""
    if not texts:
        return []
    # verbose=False: no warning about long texts, because they are dropped.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def given_response(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], limit: int
) -> Sample:
    """Return the data set's own response as a sample, cut at `limit` tokens.

    If the model has several stop tokens, the response ends with the tokenizer's.
    """
    eos_id = tokenizer.eos_token_id
    ids = response_token_ids(prompt, tokenizer, eos_id if eos_id in stop_ids else min(stop_ids))
    return Sample(prompt, 0, list(ids[:limit]), "stop" if len(ids) <= limit else "length")


def response_token_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, eos_id: int
) -> tuple[int, ...]:
    """Tokenize the data set's own response, followed by the end token, with either template."""
    assert prompt.response is not None, "build the prompts with keep_responses"
    ids = _tokenize(tokenizer, [prompt.response])[0]
    return (*ids, eos_id) if ids[-1:] != [eos_id] else tuple(ids)
